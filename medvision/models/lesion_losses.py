"""The losses of the lesion score: is an anchor a lesion or background."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from medvision.models.config import RetinaNetConfig


class Judged(NamedTuple):
    """The lesion logits of a batch and what is true of each anchor."""

    logits: Tensor  # [batch, anchors]
    positive: Tensor  # [batch, anchors] bool: stands for a lesion
    counted: Tensor  # [batch, anchors] bool: is lesion or background, not to be ignored
    overlap: Tensor  # [positives]: IoU of the predicted box with that of the lesion


def focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the summed focal loss of binary ``targets`` (0 or 1), any shape.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5:
    ``-alpha_t (1 - p_t)^gamma log(p_t)``. Without lesions the sum is small but not zero.
    """
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_wrong = torch.where(targets > 0.5, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(targets > 0.5, alpha, 1 - alpha)
    return (weight * focus(p_wrong, gamma) * cross_entropy).sum()


def focus(p_wrong: Tensor, gamma: float) -> Tensor:
    """Return ``p_wrong^gamma``, what an example counts for; ``p_wrong`` is a probability of any shape.

    Its gradient is finite also where ``p_wrong`` was rounded to 0, as of an answer that is sure and right.
    """
    if gamma < 1:
        # Such a power's slope is infinite at 0; times the loss there, 0, that is not a number.
        p_wrong = p_wrong.clamp(min=torch.finfo(p_wrong.dtype).tiny)
    return p_wrong.pow(gamma)


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
    weight = torch.where(quality > 0, quality, alpha * focus(logits.sigmoid(), gamma))
    return (weight * cross_entropy).sum()


def focal(judged: Judged, config: RetinaNetConfig) -> Tensor:
    """Return the focal loss of the anchors that count."""
    targets = judged.positive[judged.counted].float()
    logits = judged.logits[judged.counted]
    return focal_loss(logits, targets, config.focal_alpha, config.focal_gamma)


def balanced(judged: Judged, config: RetinaNetConfig) -> Tensor:
    """Return the balanced cross-entropy of the anchors that count."""
    targets = judged.positive[judged.counted].float()
    return balanced_cross_entropy(judged.logits[judged.counted], targets, config.balanced_alpha)


def hard_negative(judged: Judged, config: RetinaNetConfig) -> Tensor:
    """Return the cross-entropy of the positives and the worst negatives."""
    kept = config.negatives_per_positive
    return hard_negative_loss(judged.logits, judged.positive, judged.counted, kept)


def varifocal(judged: Judged, config: RetinaNetConfig) -> Tensor:
    """Return the varifocal loss; a positive anchor should score as well as its box fits."""
    quality = torch.zeros_like(judged.logits)
    quality[judged.positive] = judged.overlap.to(quality.dtype)
    logits, quality = judged.logits[judged.counted], quality[judged.counted]
    return varifocal_loss(logits, quality, config.varifocal_alpha, config.varifocal_gamma)
