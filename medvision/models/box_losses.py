"""The losses of the boxes: where is a lesion, and how large."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import distance_box_iou_loss, generalized_box_iou_loss

from medvision.models.box_coder import encode_boxes
from medvision.models.config import RetinaNetConfig


class Placed(NamedTuple):
    """The boxes of the positive anchors of a batch, all ``[positives, 4]``."""

    predicted: Tensor
    deltas: Tensor
    anchors: Tensor
    target: Tensor


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the summed GIoU loss of ``[n, 4]`` boxes x1, y1, x2, y2 (Rezatofighi et al. 2019)."""
    return generalized_box_iou_loss(predicted, target, reduction="sum")


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the summed DIoU loss of ``[n, 4]`` boxes x1, y1, x2, y2: 1 - IoU + (distance / diagonal)^2.

    Zheng et al., Distance-IoU Loss, AAAI 2020: distance of the centres, diagonal of the box round both.
    """
    return distance_box_iou_loss(predicted, target, reduction="sum")


def smooth_l1_loss(deltas: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return the summed smooth L1 loss of ``[n, 4]`` encoded boxes dx, dy, dw, dh.

    Girshick, Fast R-CNN, ICCV 2015, equation 3: ``d^2 / (2 beta)`` for errors under ``beta``,
    ``|d| - beta / 2`` above.
    """
    return functional.smooth_l1_loss(deltas, target, reduction="sum", beta=beta)


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return ``[n]``, the IoU of each row of ``first`` with that of ``second``, both ``[n, 4]``."""
    low = torch.maximum(first[:, :2], second[:, :2])
    high = torch.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = (first[:, 2:] - first[:, :2]).prod(dim=1) + (second[:, 2:] - second[:, :2]).prod(dim=1)
    return shared / (areas - shared).clamp(min=torch.finfo(shared.dtype).tiny)


def giou(placed: Placed, config: RetinaNetConfig) -> Tensor:
    """Return the GIoU loss of the positive anchors' boxes."""
    return giou_loss(placed.predicted, placed.target)


def diou(placed: Placed, config: RetinaNetConfig) -> Tensor:
    """Return the DIoU loss of the positive anchors' boxes."""
    return diou_loss(placed.predicted, placed.target)


def smooth_l1(placed: Placed, config: RetinaNetConfig) -> Tensor:
    """Return the smooth L1 loss of the positive anchors' deltas."""
    target = encode_boxes(placed.target, placed.anchors)
    return smooth_l1_loss(placed.deltas, target, config.smooth_l1_beta)
