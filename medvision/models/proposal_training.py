"""What the first stage learns: which anchors stand for a lesion, and the losses of objectness and box."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from medvision.models.box_coder import encode_boxes
from medvision.models.choices import PROPOSAL_LOSSES, PROPOSAL_MATCHERS, find_choice
from medvision.models.criterion import Target
from medvision.models.lesion_losses import focal_loss
from medvision.models.matcher import BACKGROUND, IGNORED, ignore_inside, match_atss, match_iou
from medvision.models.proposals import RawProposals
from medvision.models.two_stage_config import ProposalConfig

SMOOTH_L1_BETA = 1 / 9
"""Where the box loss goes from square to linear, in anchor sizes (Faster R-CNN's own code)."""


@dataclass(frozen=True)
class ObjectnessLoss:
    """How objectness is learned: the sum over anchors of ``value(logits, 0 or 1, settings)``.

    ``drawn``: on some anchors drawn at random, and divided by their number; else on all, divided by the
    number of lesions' anchors, with each anchor a lesion of 1 percent at the start.
    """

    value: Callable[[Tensor, Tensor, ProposalConfig], Tensor]
    drawn: bool


def focal(logits: Tensor, wanted: Tensor, config: ProposalConfig) -> Tensor:
    """Return the summed focal loss, as RetinaNet's."""
    return focal_loss(logits, wanted, config.focal_alpha, config.focal_gamma)


def cross_entropy(logits: Tensor, wanted: Tensor, config: ProposalConfig) -> Tensor:
    """Return the summed cross-entropy: Ren et al., Faster R-CNN, NeurIPS 2015, equation 1."""
    return functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")


FOCAL = ObjectnessLoss(focal, drawn=False)
SAMPLED = ObjectnessLoss(cross_entropy, drawn=True)


def by_atss(anchors: list[Tensor], boxes: Tensor, config: ProposalConfig) -> Tensor:
    """Match as :func:`match_atss` does, with the settings' number of candidates."""
    return match_atss(anchors, boxes, config.atss_candidates)


def by_iou(anchors: list[Tensor], boxes: Tensor, config: ProposalConfig) -> Tensor:
    """Match as :func:`match_iou` does, with the settings' thresholds."""
    return match_iou(anchors, boxes, config.foreground_iou, config.background_iou)


def draw_sample(
    matched: Tensor, count: int, positive_share: float, generator: torch.Generator
) -> Tensor:
    """Return the indices of at most ``count`` of ``matched`` ``[n]``, drawn at random, positives first.

    At most ``positive_share`` of ``count`` are on lesions, the rest is background; none is IGNORED.
    """
    order = torch.randperm(len(matched), generator=generator).to(matched.device)
    shuffled = matched[order]
    positive = order[shuffled >= 0][: max(1, int(count * positive_share))]
    negative = order[shuffled == BACKGROUND][: count - len(positive)]
    return torch.cat((positive, negative))


@torch.no_grad()
def match_anchors(
    anchors: list[Tensor],
    targets: Sequence[Target],
    config: ProposalConfig,
    generator: torch.Generator,
) -> Tensor:
    """Return ``[batch, anchors]``: each anchor's box, BACKGROUND, or IGNORED, also if not drawn."""
    match = find_choice(PROPOSAL_MATCHERS, config.matcher)
    loss: ObjectnessLoss = find_choice(PROPOSAL_LOSSES, config.loss)
    flat = torch.cat(anchors)
    rows = []
    for target in targets:
        matched = match(anchors, target["boxes"], config)
        matched = ignore_inside(flat, matched, target["ignored"])
        if loss.drawn:
            drawn = draw_sample(matched, config.anchors_sampled, config.positive_share, generator)
            kept = torch.full_like(matched, IGNORED)
            matched = kept.index_copy(0, drawn, matched[drawn])
        rows.append(matched)
    return torch.stack(rows)


def proposal_losses(
    raw: RawProposals, matched: Tensor, targets: Sequence[Target], config: ProposalConfig
) -> dict[str, Tensor]:
    """Return the losses ``objectness`` and ``proposal_box``; finite without any lesion.

    Objectness is divided by the number of anchors drawn, or of lesions' anchors where none are drawn, the
    smooth L1 loss of the deltas by that of lesions' anchors; by 1 if there are none. Ren et al. (equation 1)
    divide the last by the number of anchor places, times 10, torchvision by that of anchors drawn.
    """
    positive, counted = matched >= 0, matched != IGNORED
    count = positive.sum().clamp(min=1)
    logits, wanted = raw.objectness[counted], positive[counted].float()
    loss: ObjectnessLoss = find_choice(PROPOSAL_LOSSES, config.loss)
    among = counted.sum().clamp(min=1) if loss.drawn else count
    objectness = loss.value(logits, wanted, config) / among
    anchors = torch.cat(raw.anchors).expand(len(matched), -1, 4)[positive]
    deltas = encode_boxes(boxes_of([*matched], targets), anchors)
    box = functional.smooth_l1_loss(
        raw.deltas[positive], deltas, reduction="sum", beta=SMOOTH_L1_BETA
    )
    return {"objectness": objectness, "proposal_box": config.box_weight * box / count}


def boxes_of(matched: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """Return the boxes ``[positives, 4]`` that the positives of all images stand for, in order."""
    return torch.cat(
        [target["boxes"][row[row >= 0]] for row, target in zip(matched, targets, strict=True)]
    )
