"""Boxes of several views of a slice -> one set of boxes: mirrored back, and fused where they agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medvision.boxes import cluster_views
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

    Boxes and class probabilities are means weighted by score, scores those of :func:`cluster_views`. The
    mask is that of the box with the highest score.
    """
    boxes = torch.cat([view["boxes"] for view in views])
    scores = torch.cat([view["scores"] for view in views])
    classes = torch.cat([view["class_probabilities"] for view in views])
    number = np.repeat(np.arange(len(views)), [len(view["scores"]) for view in views])
    clusters = cluster_views(
        boxes.double().cpu().numpy(), scores.double().cpu().numpy(), number, len(views), nms_thresh
    )
    clusters.sort(key=lambda cluster: -cluster.score)
    kept = [cluster for cluster in clusters if cluster.score > score_thresh][:detections_per_img]
    rows = [torch.from_numpy(cluster.rows).to(scores.device) for cluster in kept]
    fused: MaskDetections = {
        "boxes": _weighted(boxes, scores, rows),
        "scores": scores.new_tensor([cluster.score for cluster in kept]),
        "class_probabilities": _weighted(classes, scores, rows),
    }
    if views and all("masks" in view for view in views):
        masks = torch.cat([view["masks"] for view in views])
        fused["masks"] = masks[[int(cluster.rows[0]) for cluster in kept]]
    return fused


def _weighted(values: Tensor, scores: Tensor, clusters: list[Tensor]) -> Tensor:
    means = [
        (values[rows] * scores[rows, None]).sum(dim=0) / scores[rows].sum().clamp(min=1e-9)
        for rows in clusters
    ]
    return torch.stack(means) if means else values[:0]
