"""The CT's own nodule: what the four readers outlined, in the CT's grid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.geometry import Box
from medvision.labels.annotation import Annotation
from medvision.sample.lidc import Nodule, Outline
from medvision.sample.shapes import coverage, mask_of, outline_shape
from medvision.scans.volume import Volume


def outline_mask(outline: Outline, volume: Volume) -> NDArray[np.bool_]:
    """Return the voxels inside a reader's outline of this very scan, in the scan's shape.

    LIDC's pixel (0, 0) is the middle of the first pixel of DICOM's first row; the scan's rows must
    grow to the back and its columns to the left.
    """
    column, row = outline.center_mm[:2] / outline.pixel_mm
    height = float(volume.patient_to_index([0.0, 0.0, outline.center_mm[2]])[0])
    place = np.array([height, row, column])
    voxel = np.rint(place).astype(int)
    z, y, x = ((place - voxel) * volume.spacing_mm).tolist()
    inside = mask_of(coverage(outline_shape(outline), volume.spacing_mm, (z, y, x)))
    low = voxel - np.array(inside.shape) // 2
    high = low + inside.shape
    if (low < 0).any() or (high > volume.shape).any():
        raise InputError("An outline of the scan must lie inside the scan; it does not.")
    mask = np.zeros(volume.shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = inside
    return mask


def agreed_nodule(nodule: Nodule, volume: Volume, readers: int, label: int = 1) -> Annotation:
    """Return the voxels that at least so many readers include; InputError if there are none."""
    votes = np.zeros(volume.shape, dtype=np.uint8)
    for outline in nodule.outlines:
        votes += outline_mask(outline, volume)
    found = np.argwhere(votes >= readers)
    if not found.size:
        raise InputError(f"No voxel of the CT is inside the outlines of {readers} readers.")
    box = Box(*found.min(axis=0).tolist(), *(found.max(axis=0) + 1).tolist())
    return Annotation(label, nodule.class_name, box, votes[box.slices] >= readers)
