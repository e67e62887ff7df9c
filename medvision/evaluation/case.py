"""CaseResult: one scan's findings beside its reference, and where and how large the lesions are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision import geometry
from medvision.findings.finding import Finding
from medvision.geometry import Affine
from medvision.labels.annotation import Annotation
from medvision.labels.diameter import box_diameter_mm, mask_diameter_mm


@dataclass(frozen=True)
class CaseResult:
    """The findings and the reference of one scan, both in the scan's own grid.

    ``annotations`` empty means that a reader looked and saw nothing: a scan without a reference
    must not become a CaseResult. ``patient`` groups scans that are resampled together; empty: its
    own.
    """

    case_id: str
    findings: tuple[Finding, ...]
    annotations: tuple[Annotation, ...]
    affine: Affine
    shape: tuple[int, int, int]
    patient: str = ""

    @property
    def lesions(self) -> tuple[Annotation, ...]:
        """The reference lesions to find."""
        return tuple(item for item in self.annotations if not item.ignore)

    @property
    def ignored(self) -> tuple[Annotation, ...]:
        """The regions that count neither for nor against the model."""
        return tuple(item for item in self.annotations if item.ignore)

    @property
    def healthy(self) -> bool:
        """Tell whether the reference has no lesion to find."""
        return not self.lesions


def center_mm(annotation: Annotation, affine: Affine) -> NDArray[np.float64]:
    """Return the centre of mass of the mask, or the middle of the box, in LPS mm ``[3]``."""
    indices = _mask_indices(annotation)
    middle = annotation.box.center_index if indices is None else indices.mean(axis=0)
    return geometry.index_to_patient(affine, middle)


def equivalent_diameter_mm(annotation: Annotation, affine: Affine) -> float:
    """Return the diameter of the sphere with the lesion's volume, in mm.

    Of a lesion known by its box alone: that of the ellipsoid inscribed in the box, which is the
    geometric mean of the three sides.
    """
    voxel = geometry.voxel_volume_mm3(affine)
    indices = _mask_indices(annotation)
    if indices is None:
        sides = annotation.box.upper - annotation.box.lower
        return float((np.prod(sides) * voxel) ** (1 / 3))
    return float((6 * len(indices) * voxel / np.pi) ** (1 / 3))


def longest_diameter_mm(annotation: Annotation, affine: Affine) -> float:
    """Return the longest in-plane diameter in mm: what radiologists measure and tables sort by."""
    if annotation.mask is None or not annotation.mask.any():
        return box_diameter_mm(annotation.box, affine)
    return mask_diameter_mm(annotation.mask, affine)


def contains(
    annotation: Annotation, affine: Affine, points_mm: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Tell for points ``[n, 3]`` in LPS mm whether each lies in a voxel of the lesion, ``[n]``.

    A lesion known by its box alone is taken as the ellipsoid inscribed in the box.
    """
    index = geometry.patient_to_index(affine, points_mm).reshape(-1, 3)
    box = annotation.box
    if annotation.mask is None or not annotation.mask.any():
        half = (box.upper - box.lower) / 2
        return (((index - box.center_index) / half) ** 2).sum(axis=1) < 1
    start = np.array([axis.start for axis in box.slices])
    local = np.floor(index + 0.5).astype(int) - start
    inside = ((local >= 0) & (local < annotation.mask.shape)).all(axis=1)
    result = np.zeros(len(index), dtype=bool)
    result[inside] = annotation.mask[tuple(local[inside].T)]
    return result


def _mask_indices(annotation: Annotation) -> NDArray[np.int64] | None:
    if annotation.mask is None or not annotation.mask.any():
        return None
    start = [axis.start for axis in annotation.box.slices]
    return np.argwhere(annotation.mask) + np.array(start)
