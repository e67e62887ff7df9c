"""The longest in-plane diameter of a lesion, for label files and for findings alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medvision.geometry import Affine, Box, spacing_of

_FEW_POINTS = 48
"""Below this many outline points all pairs are cheaper than a convex hull."""


def mask_diameter_mm(mask: NDArray[np.bool_], affine: Affine) -> float:
    """Return the longest in-plane (Feret) diameter of a mask in mm: the largest over its slices.

    ``mask[slice, row, column]`` may be a crop; ``affine`` is that of the scan or of the crop, as
    only its row and column vectors count. The outline runs through the middles of the outer pixel
    edges, the 0.5 level of the mask as in PyRadiomics: a run of n square pixels measures n
    spacings, and a disc is not overstated by a pixel diagonal. The pieces of a lesion in several
    pieces are measured together. 0.0 for an empty mask.
    """
    planes = np.flatnonzero(mask.any(axis=(1, 2)))
    return max((_plane_diameter_mm(mask[plane], affine) for plane in planes), default=0.0)


def box_diameter_mm(box: Box, affine: Affine) -> float:
    """Return the longer in-plane side of a box in mm: the diameter of the ellipse inside it."""
    _, rows, columns = (box.upper - box.lower) * spacing_of(affine)
    return float(max(rows, columns))


def _plane_diameter_mm(plane: NDArray[np.bool_], affine: Affine) -> float:
    points = _outline(plane)
    if len(points) > _FEW_POINTS:
        from scipy.spatial import ConvexHull

        points = points[ConvexHull(points).vertices]
    points_mm = points @ affine[:3, 1:3].T
    gaps = points_mm[:, None, :] - points_mm[None, :, :]
    return float(np.sqrt((gaps**2).sum(axis=2).max()))


def _outline(plane: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return edge middles (row, column) of the first and last pixel of every row and column."""
    across = _ends(plane)
    down = _ends(plane.T)[:, ::-1]
    return np.concatenate([across, down])


def _ends(plane: NDArray[np.bool_]) -> NDArray[np.float64]:
    lines = np.flatnonzero(plane.any(axis=1))
    first = plane[lines].argmax(axis=1) - 0.5
    last = plane.shape[1] - plane[lines, ::-1].argmax(axis=1) - 0.5
    return np.stack([np.concatenate([lines, lines]), np.concatenate([first, last])], axis=1)
