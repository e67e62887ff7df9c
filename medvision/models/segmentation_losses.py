"""Losses of a segmentation: how far the classes of all pixels are from the truth.

All take ``logits`` ``[batch, channel, row, column]`` with channel 0 for background, and a
:class:`SegmentationTruth`. Overlap losses are taken over the whole batch and averaged over the lesion
classes: a single crop of a rare lesion's class is mostly empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from medvision.models.choices import SEGMENTATION_LOSSES, find_choice
from medvision.models.unet_config import SegmentationLossConfig

IGNORED = 255
"""Value in a class map of pixels that are neither lesion nor background."""

_SMOOTH = 0.5
"""Pixels added to both sides of an overlap, so that an empty class has a finite loss and gradient."""

_LEAST = 1e-6
"""A power below 1 has an infinite slope at 0; closer to a perfect overlap it is not followed."""


@dataclass(frozen=True)
class SegmentationTruth:
    """The classes of a batch's pixels and what each counts for.

    ``class_map`` ``[batch, row, column]``: 0 background, 1.. classes, 255 ignored. ``class_weights`` is
    ``[channel]``, background first; None: all count alike. ``added_weights`` has the map's shape and is
    added to them, as in U-Net's equation 2: what a pixel counts for beyond its class.
    """

    class_map: Tensor
    class_weights: Tensor | None = None
    added_weights: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """Class of each pixel, with 0 for ignored ones, as an index."""
        return torch.where(self.class_map == IGNORED, 0, self.class_map).long()

    @property
    def pixel_weights(self) -> Tensor:
        """What each pixel counts for whatever its class: 0 if ignored, else 1 and what is added."""
        return self._counted(torch.ones_like(self.class_map, dtype=torch.float32))

    @property
    def weights(self) -> Tensor:
        """What each pixel counts for: 0 if ignored, else its class's weight and what is added."""
        if self.class_weights is None:
            return self.pixel_weights
        return self._counted(self.class_weights[self.labels])

    def _counted(self, weights: Tensor) -> Tensor:
        if self.added_weights is not None:
            weights = weights + self.added_weights
        return weights * (self.class_map != IGNORED)


class SegmentationTarget(TypedDict):
    """The truth of one stack: the class of each pixel of its middle slice."""

    class_map: Tensor  # [row, column], integer: 0 background, 1.. classes, 255 ignored
    added_weights: NotRequired[Tensor]  # [row, column]; for all targets of a batch or none


def added_weights(targets: Sequence[Mapping[str, Any]]) -> Tensor | None:
    """Return ``[batch, row, column]`` what pixels count for beyond their class; None if nothing is added."""
    given = [target["added_weights"] for target in targets if "added_weights" in target]
    return torch.stack(given) if given else None


def cross_entropy_loss(
    logits: Tensor, truth: SegmentationTruth, settings: SegmentationLossConfig
) -> Tensor:
    """Return the cross-entropy, averaged by class and pixel weights (U-Net, equation 1)."""
    entropy, weights = _entropy(logits, truth)
    return _mean(entropy, weights)


def focal_loss(
    logits: Tensor, truth: SegmentationTruth, settings: SegmentationLossConfig
) -> Tensor:
    """Return the mean of ``-(1 - p_t)^gamma log(p_t)`` over the softmax (Lin et al., ICCV 2017).

    Class weights stand for the paper's alpha.
    """
    entropy, weights = _entropy(logits, truth)
    wrong = -torch.expm1(-entropy)  # 1 - p_t
    return _mean(wrong.clamp(min=_LEAST).pow(settings.focal_gamma) * entropy, weights)


def dice_loss(logits: Tensor, truth: SegmentationTruth, settings: SegmentationLossConfig) -> Tensor:
    """Return 1 - Dice of probabilities and truth (Sudre et al., DLMIA 2017): Tversky at 0.5, 0.5."""
    return _class_mean(1 - tversky_index(logits, truth, 0.5, 0.5), truth)


def tversky_loss(
    logits: Tensor, truth: SegmentationTruth, settings: SegmentationLossConfig
) -> Tensor:
    """Return 1 - Tversky index; beta above alpha favours sensitivity (Salehi et al., MLMI 2017)."""
    index = tversky_index(logits, truth, settings.tversky_alpha, settings.tversky_beta)
    return _class_mean(1 - index, truth)


def focal_tversky_loss(
    logits: Tensor, truth: SegmentationTruth, settings: SegmentationLossConfig
) -> Tensor:
    """Return (1 - Tversky index)^power (Abraham and Khan, ISBI 2019; power = 1 / gamma = 0.75)."""
    index = tversky_index(logits, truth, settings.tversky_alpha, settings.tversky_beta)
    distance = (1 - index).clamp(min=_LEAST)
    return _class_mean(distance.pow(settings.focal_tversky_power), truth)


def tversky_index(logits: Tensor, truth: SegmentationTruth, alpha: float, beta: float) -> Tensor:
    """Return ``[classes]`` TP / (TP + alpha FP + beta FN) of the lesion classes, 0..1, over the batch.

    Half a pixel is added above and below: a class that is neither there nor predicted has index 1.
    """
    probability = torch.softmax(logits, dim=1)[:, 1:]
    classes = torch.arange(1, logits.shape[1], device=logits.device)
    there = truth.labels[:, None] == classes[:, None, None]  # [batch, class, row, column]
    weights = truth.pixel_weights[:, None]
    overlap = (weights * probability * there).sum(dim=(0, 2, 3))
    predicted = (weights * probability).sum(dim=(0, 2, 3))
    true = (weights * there).sum(dim=(0, 2, 3))
    wrong = alpha * (predicted - overlap) + beta * (true - overlap)
    return (overlap + _SMOOTH) / (overlap + wrong + _SMOOTH)


def segmentation_losses(
    logits: Tensor, truth: SegmentationTruth, settings: SegmentationLossConfig
) -> dict[str, Tensor]:
    """Return the losses in use, each times its weight; their sum is what to minimise."""
    logits = logits.float()
    return {
        name: weight * find_choice(SEGMENTATION_LOSSES, name)(logits, truth, settings)
        for name, weight in settings.weights.items()
    }


def _entropy(logits: Tensor, truth: SegmentationTruth) -> tuple[Tensor, Tensor]:
    """Return each pixel's cross-entropy and weight, both ``[batch, row, column]``."""
    return functional.cross_entropy(logits, truth.labels, reduction="none"), truth.weights


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    # Where nothing counts the mean is 0 and so is its gradient.
    return (weights * values).sum() / weights.sum().clamp(min=_LEAST)


def _class_mean(values: Tensor, truth: SegmentationTruth) -> Tensor:
    if truth.class_weights is None:
        return values.mean()
    return _mean(values, truth.class_weights[1:])
