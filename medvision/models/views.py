"""Boxes of several views of a slice -> one set of boxes: mirrored back, and fused where they agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from medvision.models.mask_head import MaskDetections


def mirror_detections(
    found: MaskDetections, size: tuple[int, int], axes: tuple[int, ...]
) -> MaskDetections:
    """Return the boxes and masks of a slice of ``size`` (rows, columns) mirrored along ``axes``.

    ``axes`` are of an image: -1 mirrors columns, -2 rows.
    """
    boxes = found["boxes"].clone()
    for axis, (low, high) in ((-1, (0, 2)), (-2, (1, 3))):
        if axis in axes:
            boxes[:, low] = size[axis] - found["boxes"][:, high]
            boxes[:, high] = size[axis] - found["boxes"][:, low]
    mirrored: MaskDetections = {**found, "boxes": boxes}
    if "masks" in found and axes:
        mirrored["masks"] = found["masks"].flip(axes)
    return mirrored


def fuse_views(
    views: Sequence[MaskDetections],
    *,
    score_thresh: float,
    nms_thresh: float,
    detections_per_img: int,
) -> MaskDetections:
    """Fuse the boxes of all views of one slice that overlap by more than ``nms_thresh``.

    Weighted boxes fusion (Solovyev et al., Image and Vision Computing 2021): box and class probabilities
    are means weighted by score. The score is the mean over the views of the best score in each, 0 where
    a view has none, so that a box which one view alone sees counts for little. The mask is that of the
    box with the highest score.
    """
    boxes = torch.cat([view["boxes"] for view in views])
    scores = torch.cat([view["scores"] for view in views])
    classes = torch.cat([view["class_probabilities"] for view in views])
    number = torch.cat([scores.new_full((len(v["scores"]),), i) for i, v in enumerate(views)])
    clusters = _clusters(boxes, scores, nms_thresh)
    means, lead = [], []
    for rows in clusters:
        best = [scores[rows[number[rows] == view]].amax() for view in number[rows].unique()]
        means.append(torch.stack(best).sum() / len(views))
        lead.append(rows[0])
    order = [
        int(index)
        for index in torch.tensor([float(mean) for mean in means]).argsort(descending=True)
        if float(means[index]) > score_thresh
    ][:detections_per_img]
    fused: MaskDetections = {
        "boxes": _weighted(boxes, scores, clusters, order),
        "scores": torch.stack([means[index] for index in order]) if order else scores[:0],
        "class_probabilities": _weighted(classes, scores, clusters, order),
    }
    if views and all("masks" in view for view in views):
        masks = torch.cat([view["masks"] for view in views])
        fused["masks"] = masks[[int(lead[index]) for index in order]]
    return fused


def _clusters(boxes: Tensor, scores: Tensor, overlap: float) -> list[Tensor]:
    """Group boxes around the best free one; rows of each group by falling score."""
    free = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    ranked = scores.argsort(descending=True, stable=True)
    overlaps = box_iou(boxes, boxes)
    clusters = []
    for seed in ranked.tolist():
        if free[seed]:
            rows = ranked[(free & (overlaps[seed] > overlap))[ranked]]
            rows = torch.cat((rows.new_tensor([seed]), rows[rows != seed]))
            clusters.append(rows)
            free[rows] = False
    return clusters


def _weighted(values: Tensor, scores: Tensor, clusters: list[Tensor], order: list[int]) -> Tensor:
    means = [
        (values[rows] * scores[rows, None]).sum(dim=0) / scores[rows].sum().clamp(min=1e-9)
        for rows in (clusters[index] for index in order)
    ]
    return torch.stack(means) if means else values[:0]
