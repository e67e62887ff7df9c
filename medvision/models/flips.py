"""Test-time augmentation: the mean of what the network says of slices and of their mirror images."""

from __future__ import annotations

import torch
from torch import Tensor

from medvision.models.retinanet import RawDetections, RetinaNet

MIRRORED_AXES: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
"""Axes of ``[batch, channel, row, column]`` mirrored in each view; () is the slice as it is."""


def detect_with_flips(network: RetinaNet, images: Tensor) -> RawDetections:
    """Return raw detections averaged over four mirror images, in the frame of ``images``.

    Anchors lie symmetrically on slices whose sides are multiples of the strides, so that anchors of
    mirror images fall onto each other, and each is averaged by itself: logits and box corners.
    """
    views = []
    for axes in MIRRORED_AXES:
        mirrored = images.flip(axes) if axes else images
        views.append(_mirrored_back(network(mirrored), network.strides, images, axes))
    segmented = [view.segmentation_logits for view in views if view.segmentation_logits is not None]
    return RawDetections(
        torch.stack([view.lesion_logits for view in views]).mean(dim=0),
        torch.stack([view.class_logits for view in views]).mean(dim=0),
        torch.stack([view.boxes for view in views]).mean(dim=0),
        views[0].anchors,
        segmentation_logits=torch.stack(segmented).mean(dim=0) if segmented else None,
    )


def _mirrored_back(
    raw: RawDetections, strides: list[int], images: Tensor, axes: tuple[int, ...]
) -> RawDetections:
    if not axes:
        return raw
    boxes = raw.boxes.clone()
    # Row or column edges of a box change places when their axis is mirrored.
    for axis, (low, high) in ((-1, (0, 2)), (-2, (1, 3))):
        if axis in axes:
            size = images.shape[axis]
            boxes[..., low], boxes[..., high] = (
                size - raw.boxes[..., high],
                size - raw.boxes[..., low],
            )
    sizes = [(images.shape[-2] // stride, images.shape[-1] // stride) for stride in strides]
    parts = (raw.lesion_logits[..., None], raw.class_logits, boxes)
    lesion, classes, placed = (_mirror_levels(part, raw.anchors, sizes, axes) for part in parts)
    segmented = raw.segmentation_logits
    if segmented is not None:
        segmented = segmented.flip(axes)
    return RawDetections(
        lesion[..., 0], classes, placed, raw.anchors, segmentation_logits=segmented
    )


def _mirror_levels(
    values: Tensor, anchors: list[Tensor], sizes: list[tuple[int, int]], axes: tuple[int, ...]
) -> Tensor:
    """Mirror ``[batch, anchors, value]`` level by level on its grid of cells."""
    levels = []
    grid_axes = [axis + 3 for axis in axes]  # rows are axis 1 and columns axis 2 of the grid
    for part, (rows, columns) in zip(
        values.split([len(level) for level in anchors], dim=1), sizes, strict=True
    ):
        grid = part.reshape(len(part), rows, columns, -1, part.shape[-1])
        levels.append(grid.flip(grid_axes).reshape(part.shape))
    return torch.cat(levels, dim=1)
