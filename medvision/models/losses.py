"""The losses of the detector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss


def focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the summed focal loss of binary ``targets`` (0 or 1), any shape.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5:
    ``-alpha_t (1 - p_t)^gamma log(p_t)``. Without lesions the sum is small but not zero.
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_wrong = torch.where(targets > 0.5, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(targets > 0.5, alpha, 1 - alpha)
    return (weight * p_wrong.pow(gamma) * cross_entropy).sum()


def box_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the summed GIoU loss of ``[n, 4]`` boxes x1, y1, x2, y2 (Rezatofighi et al. 2019)."""
    return generalized_box_iou_loss(predicted, target, reduction="sum")


def class_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the summed cross-entropy of ``[n, classes]`` logits; ``weights`` evens rare classes out."""
    return functional.cross_entropy(logits, labels, weight=weights, reduction="sum")
