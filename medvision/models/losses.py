"""The losses of the detector: is it a lesion, where is its box, of which class is it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import distance_box_iou_loss, generalized_box_iou_loss


def focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the summed focal loss of binary ``targets`` (0 or 1), any shape.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5:
    ``-alpha_t (1 - p_t)^gamma log(p_t)``. Without lesions the sum is small but not zero.
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_wrong = torch.where(targets > 0.5, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(targets > 0.5, alpha, 1 - alpha)
    return (weight * p_wrong.pow(gamma) * cross_entropy).sum()


def balanced_cross_entropy(logits: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """Return the summed cross-entropy of binary ``targets``, weighted ``alpha`` for 1, ``1 - alpha`` for 0.

    Lin et al., ICCV 2017, equation 3: ``-alpha_t log(p_t)``; an alpha of 0.75 was best there (table 1a).
    """
    weight = torch.where(targets > 0.5, alpha, 1 - alpha)
    return functional.binary_cross_entropy_with_logits(logits, targets, weight, reduction="sum")


def hard_negative_loss(
    logits: Tensor, positive: Tensor, counted: Tensor, negatives_per_positive: int
) -> Tensor:
    """Return the summed cross-entropy of all positives and the worst negatives of each image.

    Liu et al., SSD, ECCV 2016, section 2.2: 3 negatives for each positive, those with the highest loss.
    All three are ``[batch, anchors]``, the last two bool: what counts and is not positive is negative.
    An image without a lesion keeps as many negatives as one with a single positive: in SSD it would
    teach nothing, and false positives on healthy slices would never be unlearnt.
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(
        logits, positive.to(logits.dtype), reduction="none"
    )
    negative = counted & ~positive
    kept = negatives_per_positive * positive.sum(dim=1, keepdim=True).clamp(min=1)
    hardness = cross_entropy.detach().masked_fill(~negative, -1.0)  # below every cross-entropy
    rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
    return cross_entropy[positive | (negative & (rank < kept))].sum()


def varifocal_loss(logits: Tensor, quality: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the summed varifocal loss, any shape: the score learns how well the box will fit.

    Zhang et al., VarifocalNet, CVPR 2021, equation 2. ``quality`` is the IoU of the predicted box with
    its lesion, 0..1, and 0 for background: ``-q (q log(p) + (1 - q) log(1 - p))`` where q > 0,
    ``-alpha p^gamma log(1 - p)`` elsewhere; 0.75 and 2 in the paper.
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    weight = torch.where(quality > 0, quality, alpha * logits.sigmoid().pow(gamma))
    return (weight * cross_entropy).sum()


def box_loss(predicted: Tensor, target: Tensor) -> Tensor:
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


def class_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the summed cross-entropy of ``[n, classes]`` logits; ``weights`` evens rare classes out."""
    return functional.cross_entropy(logits, labels, weight=weights, reduction="sum")


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return ``[n]``, the IoU of each row of ``first`` with that of ``second``, both ``[n, 4]``."""
    low = torch.maximum(first[:, :2], second[:, :2])
    high = torch.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = (first[:, 2:] - first[:, :2]).prod(dim=1) + (second[:, 2:] - second[:, :2]).prod(dim=1)
    return shared / (areas - shared).clamp(min=torch.finfo(shared.dtype).tiny)
