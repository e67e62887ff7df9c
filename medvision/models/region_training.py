"""What the second stage learns: which regions it is trained on, and the loss of their class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import nms

from medvision.models.choices import REGION_LOSSES, find_choice
from medvision.models.criterion import Target
from medvision.models.lesion_losses import focus
from medvision.models.matcher import IGNORED, ignore_inside, match_iou
from medvision.models.proposal_training import draw_sample
from medvision.models.two_stage_config import RegionConfig


@dataclass(frozen=True)
class RegionLoss:
    """How a region's class is learned: ``value(logits, labels, settings)``, ``[n]``, a region each.

    ``logits`` is ``[n, 1 + classes]``, ``labels`` ``[n]`` with 0 background. ``by_lesions``: its sum, and that
    of the box loss, is divided by the number of regions on lesions; else by that of all trained on.
    """

    value: Callable[[Tensor, Tensor, RegionConfig], Tensor]
    by_lesions: bool


def cross_entropy(logits: Tensor, labels: Tensor, config: RegionConfig) -> Tensor:
    """Return each region's cross-entropy: Girshick, Fast R-CNN, ICCV 2015, equation 1."""
    return functional.cross_entropy(logits, labels, reduction="none")


def focal(logits: Tensor, labels: Tensor, config: RegionConfig) -> Tensor:
    """Return each region's focal loss ``-(1 - p)^gamma log(p)`` of the true class: Lin et al., ICCV 2017."""
    loss = functional.cross_entropy(logits, labels, reduction="none")
    return focus(1 - (-loss).exp(), config.focal_gamma) * loss


CROSS_ENTROPY = RegionLoss(cross_entropy, by_lesions=False)
FOCAL = RegionLoss(focal, by_lesions=True)


def region_class_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, config: RegionConfig
) -> Tensor:
    """Return the loss ``[n]`` of each region's class, times the weight of it, ``weights[labels]``."""
    loss: RegionLoss = find_choice(REGION_LOSSES, config.loss)
    return weights[labels] * loss.value(logits, labels, config)


@torch.no_grad()
def match_regions(
    boxes: Tensor, target: Target, config: RegionConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return which of the proposals ``[n, 4]`` the second stage is trained on, and for what each stands.

    The first are indices into ``boxes``: some drawn at random, or all but the ignored ones for OHEM.
    """
    high, low = config.foreground_iou, config.background_iou
    matched = match_iou([boxes], target["boxes"], high, low, low_quality_matches=False)
    matched = ignore_inside(boxes, matched, target["ignored"])
    if config.sampling == "ohem":
        chosen = torch.where(matched != IGNORED)[0]
    else:
        chosen = draw_sample(matched, config.regions_sampled, config.positive_share, generator)
    return chosen, matched[chosen]


def hardest_regions(losses: Tensor, regions: Sequence[Tensor], config: RegionConfig) -> Tensor:
    """Return the indices into ``losses`` ``[regions]`` of each image's regions with the highest loss.

    Online hard example mining: Shrivastava et al., Training Region-based Object Detectors with OHEM, CVPR
    2016. Of two regions on the same spot the easier is left out, or one mistake would be counted often.
    """
    kept, first = [], 0
    for boxes in regions:
        part = losses[first : first + len(boxes)].detach()
        hardest = nms(boxes, part, config.ohem_nms_thresh)[: config.regions_sampled]
        kept.append(hardest + first)
        first += len(boxes)
    return torch.cat(kept)
