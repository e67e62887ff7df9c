"""Measure a finding: longest in-plane diameter, volume and mean value."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.geometry import Affine, Box, voxel_volume_mm3
from medvision.labels.diameter import box_diameter_mm, mask_diameter_mm
from medvision.scans.volume import Volume

__all__ = [
    "Measurements",
    "box_diameter_mm",
    "box_volume_mm3",
    "ellipse_in_box",
    "ellipsoid_in_box",
    "mask_diameter_mm",
    "mask_volume_mm3",
    "measure",
]


@dataclass(frozen=True)
class Measurements:
    """Size and brightness of a lesion; ``mean_hu`` is in the scan's own units if not CT."""

    diameter_mm: float
    volume_mm3: float
    mean_hu: float


def measure(volume: Volume, box: Box, mask: NDArray[np.bool_] | None = None) -> Measurements:
    """Measure the lesion of ``box`` (voxel edges of ``volume``) and its ``mask``, if there is one.

    ``mask`` has the shape of ``box.slices``. Without a mask, or with an empty one, the lesion is
    taken for the ellipsoid that fills the box. Raises InputError for a box outside the scan or a
    mask of another shape.
    """
    voxels = volume.array[box.slices]
    if 0 in voxels.shape:
        raise InputError(f"A lesion must lie inside the scan {volume.shape}; got {box}.")
    if mask is None or not mask.any():
        inside = ellipsoid_in_box(box.clip(volume.shape), voxels.shape)
        diameter, size = box_diameter_mm(box, volume.affine), box_volume_mm3(box, volume.affine)
    else:
        if mask.shape != voxels.shape:
            raise InputError(f"A mask must fill its box {voxels.shape}; got {mask.shape}.")
        inside = mask.astype(bool)
        diameter = mask_diameter_mm(inside, volume.affine)
        size = mask_volume_mm3(inside, volume.affine)
    return Measurements(diameter, size, float(voxels[inside].mean(dtype=float)))


def mask_volume_mm3(mask: NDArray[np.bool_], affine: Affine) -> float:
    """Return the volume of a mask in mm3: its voxels times the volume of one."""
    return int(np.count_nonzero(mask)) * voxel_volume_mm3(affine)


def box_volume_mm3(box: Box, affine: Affine) -> float:
    """Return the volume in mm3 of the ellipsoid that fills a box: pi / 6 of the box."""
    return float(np.prod(box.upper - box.lower) * voxel_volume_mm3(affine) * pi / 6)


def ellipse_in_box(
    shape: tuple[int, int], row_min: float, column_min: float, row_max: float, column_max: float
) -> NDArray[np.bool_]:
    """Return a mask ``[row, column]`` of the pixels whose centre lies in the ellipse of a box.

    The box is in voxel edges of an array of ``shape``. A box that is too thin to hold a pixel
    centre gets the pixel at its middle, if that is inside ``shape``: a lesion is never empty.
    """
    rows, columns = np.ogrid[0.5 : shape[0] : 1, 0.5 : shape[1] : 1]
    middle = ((row_min + row_max) / 2, (column_min + column_max) / 2)
    down = (rows - middle[0]) / (row_max - row_min)
    across = (columns - middle[1]) / (column_max - column_min)
    mask = down**2 + across**2 <= 0.25
    if not mask.any():
        row, column = (int(np.floor(value)) for value in middle)
        if 0 <= row < shape[0] and 0 <= column < shape[1]:
            mask[row, column] = True
    return mask


def ellipsoid_in_box(box: Box, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return a mask of ``shape``, the voxels of ``box.slices``: those centred in its ellipsoid.

    At least the voxel at the middle of the box is in it.
    """
    low = np.floor(box.lower)
    center = (box.lower + box.upper) / 2 - low
    size = box.upper - box.lower
    grids = np.ogrid[0.5 : shape[0] : 1, 0.5 : shape[1] : 1, 0.5 : shape[2] : 1]
    distance = sum(((grids[axis] - center[axis]) / size[axis]) ** 2 for axis in range(3))
    mask = np.asarray(distance <= 0.25)
    if not mask.any():
        mask[tuple(np.minimum(center, np.array(shape) - 1).astype(int))] = True
    return mask
