"""Linked lesions -> Findings measured in the patient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvision.findings.finding import Finding, SliceBox
from medvision.findings.measure import ellipse_in_box, mask_diameter_mm, mask_volume_mm3
from medvision.findings.merge import LinkedLesion, SliceDetections
from medvision.findings.outline import Outline
from medvision.geometry import Affine, Box, box_to_patient, index_to_patient


def make_finding(
    finding_id: int,
    lesion: LinkedLesion,
    detections: SliceDetections,
    class_names: tuple[str, ...],
    shape: tuple[int, int, int],
    affine: Affine,
) -> Finding:
    """Turn one linked lesion into a finding of a scan of ``shape`` and ``affine``.

    The class is that of the mean class probabilities, weighted by score. The centre is the
    mean of the slice boxes' centres, weighted by score and area. The mask is what the model drew in each
    box; where it drew nothing, an ellipse.
    """
    rows = lesion.members
    scores = detections.scores[rows]
    probabilities = np.average(detections.class_probabilities[rows], axis=0, weights=scores)
    slice_boxes = tuple(_slice_box(row, detections, shape) for row in rows)
    box = _enclosing_box(slice_boxes).clip(shape)
    drawn = [detections.outlines[row] for row in rows] if detections.outlines else []
    mask = finding_mask(slice_boxes, box, drawn)
    return Finding(
        finding_id=finding_id,
        class_name=class_names[int(probabilities.argmax())],
        score=lesion.score,
        box=box,
        box_mm=box_to_patient(affine, box),
        center_mm=_center_mm(slice_boxes, affine),
        key_slice=max(slice_boxes, key=lambda item: item.score).slice_index,
        diameter_mm=mask_diameter_mm(mask, affine),
        volume_mm3=mask_volume_mm3(mask, affine),
        class_scores={
            name: float(lesion.score * p)
            for name, p in zip(class_names, probabilities, strict=True)
        },
        slice_boxes=slice_boxes,
        mask=mask,
    )


def _slice_box(row: int, detections: SliceDetections, shape: tuple[int, int, int]) -> SliceBox:
    """Clip to the slice and keep at least one pixel, so that no finding vanishes at an edge."""
    x1, y1, x2, y2 = detections.boxes[row].tolist()
    row_min, row_max = _at_least_one(y1, y2, shape[1])
    column_min, column_max = _at_least_one(x1, x2, shape[2])
    index, score = int(detections.slice_index[row]), float(detections.scores[row])
    return SliceBox(index, row_min, column_min, row_max, column_max, score)


def _at_least_one(low: float, high: float, size: int) -> tuple[float, float]:
    middle = min(max((low + high) / 2, 0.5), size - 0.5)
    return max(0.0, min(low, middle - 0.5)), min(float(size), max(high, middle + 0.5))


def _enclosing_box(slice_boxes: tuple[SliceBox, ...]) -> Box:
    return Box(
        min(item.slice_index for item in slice_boxes),
        min(item.row_min for item in slice_boxes),
        min(item.column_min for item in slice_boxes),
        max(item.slice_index for item in slice_boxes) + 1,
        max(item.row_max for item in slice_boxes),
        max(item.column_max for item in slice_boxes),
    )


def _center_mm(slice_boxes: tuple[SliceBox, ...], affine: Affine) -> tuple[float, float, float]:
    centers = [
        (
            item.slice_index,
            (item.row_min + item.row_max) / 2 - 0.5,
            (item.column_min + item.column_max) / 2 - 0.5,
        )
        for item in slice_boxes
    ]
    weights = [
        item.score * (item.row_max - item.row_min) * (item.column_max - item.column_min)
        for item in slice_boxes
    ]
    x, y, z = index_to_patient(affine, np.average(centers, axis=0, weights=weights)).tolist()
    return (x, y, z)


def finding_mask(
    slice_boxes: tuple[SliceBox, ...], box: Box, outlines: Sequence[Outline] = ()
) -> NDArray[np.bool_]:
    """Return the mask that fills ``box.slices``: in each slice the outline, or the ellipse in its box.

    Slices that the finding bridges without a box take the nearest one's. An outline that holds no pixel is
    none: a finding without a voxel could not be seen in the label volume.
    """
    planes, rows, columns = box.slices
    size = (rows.stop - rows.start, columns.stop - columns.start)
    mask = np.zeros((planes.stop - planes.start, *size), dtype=bool)
    for number, plane in enumerate(range(planes.start, planes.stop)):
        nearest = min(
            range(len(slice_boxes)), key=lambda index: abs(slice_boxes[index].slice_index - plane)
        )
        if outlines:
            mask[number] = outlines[nearest].on_grid(size, rows.start, columns.start)
        if mask[number].any():
            continue
        item = slice_boxes[nearest]
        mask[number] = ellipse_in_box(
            size,
            item.row_min - rows.start,
            item.column_min - columns.start,
            item.row_max - rows.start,
            item.column_max - columns.start,
        )
    return mask
