"""Region proposals: the few boxes of a slice that are worth a second look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, nms

from medvision.models.box_coder import decode_boxes, encode_boxes
from medvision.models.criterion import Target
from medvision.models.lesion_losses import focal_loss
from medvision.models.matcher import BACKGROUND, IGNORED, ignore_inside, match_atss, match_iou
from medvision.models.two_stage_config import ProposalConfig, RegionConfig

_PRIOR = 0.01
SMALLEST_SIDE = 1e-3
"""Proposals with a shorter side, pixels, are no boxes."""

SMOOTH_L1_BETA = 1 / 9
"""Where the box loss goes from square to linear, in anchor sizes (Faster R-CNN's own code)."""


class RawProposals(NamedTuple):
    """What the first stage says of every anchor. Level by level, then row, column, shape."""

    objectness: Tensor  # [batch, anchors], logits: is it a lesion
    deltas: Tensor  # [batch, anchors, 4]: dx, dy, dw, dh
    anchors: list[Tensor]  # one [anchors of the level, 4] a level


class ProposalHead(nn.Module):
    """One 3 x 3 convolution and two 1 x 1, the same weights on all levels.

    Ren et al., Faster R-CNN, NeurIPS 2015; on a pyramid: Lin et al., CVPR 2017.
    """

    def __init__(self, channels: int, shapes: int, config: ProposalConfig) -> None:
        """Judge ``shapes`` anchors a cell."""
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(config.depth)
        )
        self.objectness = nn.Conv2d(channels, shapes, 1)
        self.box = nn.Conv2d(channels, shapes * 4, 1)
        for name, value in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(value)
            elif name.startswith("convolutions"):
                nn.init.kaiming_normal_(value, nonlinearity="relu")
            else:
                nn.init.normal_(value, std=0.01)
        if config.loss == "focal" and self.objectness.bias is not None:
            # At the start every anchor is a lesion with 1 percent, as in the RetinaNet's head.
            nn.init.constant_(self.objectness.bias, math.log(_PRIOR / (1 - _PRIOR)))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Take pyramid levels to objectness ``[batch, anchors]`` and deltas ``[batch, anchors, 4]``."""
        logits, deltas = [], []
        for features in maps:
            for convolution in self.convolutions:
                features = functional.relu(convolution(features))
            logits.append(_per_anchor(self.objectness(features), 1))
            deltas.append(_per_anchor(self.box(features), 4))
        return torch.cat(logits, dim=1)[..., 0].float(), torch.cat(deltas, dim=1).float()


def _per_anchor(output: Tensor, values: int) -> Tensor:
    """Take ``[batch, shapes * values, row, column]`` to ``[batch, row * column * shapes, values]``."""
    batch, _, rows, columns = output.shape
    split = output.reshape(batch, -1, values, rows, columns)
    return split.permute(0, 3, 4, 1, 2).reshape(batch, -1, values)


@torch.no_grad()
def select_proposals(
    raw: RawProposals, size: tuple[int, int], config: ProposalConfig, most: int
) -> list[Tensor]:
    """Return for each image at most ``most`` boxes ``[n, 4]``, by falling objectness.

    The best of each level are moved to where the deltas say, cut to the image of ``size`` (rows, columns)
    and freed of copies by NMS, each level by itself. No gradient flows through the boxes: the stages
    are trained together, each on its own loss (approximate joint training, Ren et al. 2015).
    """
    lengths = [len(level) for level in raw.anchors]
    return [
        _select(
            [*zip(raw.anchors, logits.split(lengths), deltas.split(lengths), strict=True)],
            size,
            config,
        )[:most]
        for logits, deltas in zip(raw.objectness, raw.deltas, strict=True)
    ]


def _select(
    levels: list[tuple[Tensor, Tensor, Tensor]], size: tuple[int, int], config: ProposalConfig
) -> Tensor:
    boxes, scores, numbers = [], [], []
    for number, (anchors, logits, deltas) in enumerate(levels):
        best, order = logits.topk(min(config.pre_nms_top_n, len(logits)))
        boxes.append(decode_boxes(deltas[order], anchors[order]))
        scores.append(best.sigmoid())
        numbers.append(torch.full_like(order, number))
    cut = clip_boxes_to_image(torch.cat(boxes), size)
    # Not a number is not above any side either: RoIAlign must never see such a box.
    good = torch.where(((cut[:, 2:] - cut[:, :2]) >= SMALLEST_SIDE).all(dim=1))[0]
    cut, score, level = cut[good], torch.cat(scores)[good], torch.cat(numbers)[good]
    return cut[batched_nms(cut, score, level, config.nms_thresh)]


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
    flat = torch.cat(anchors)
    rows = []
    for target in targets:
        if config.matcher == "atss":
            matched = match_atss(anchors, target["boxes"], config.atss_candidates)
        else:
            high, low = config.foreground_iou, config.background_iou
            matched = match_iou(anchors, target["boxes"], high, low)
        matched = ignore_inside(flat, matched, target["ignored"])
        if config.loss == "sampled":
            drawn = draw_sample(matched, config.anchors_sampled, config.positive_share, generator)
            kept = torch.full_like(matched, IGNORED)
            matched = kept.index_copy(0, drawn, matched[drawn])
        rows.append(matched)
    return torch.stack(rows)


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


def proposal_losses(
    raw: RawProposals, matched: Tensor, targets: Sequence[Target], config: ProposalConfig
) -> dict[str, Tensor]:
    """Return the losses ``objectness`` and ``proposal_box``; finite without any lesion.

    Focal loss is divided by the number of lesions' anchors, cross-entropy by that of anchors drawn, the
    smooth L1 loss of the deltas by that of lesions' anchors; by 1 if there are none. Ren et al. (equation 1)
    divide the last by the number of anchor places, times 10, torchvision by that of anchors drawn.
    """
    positive, counted = matched >= 0, matched != IGNORED
    count = positive.sum().clamp(min=1)
    logits, wanted = raw.objectness[counted], positive[counted].float()
    if config.loss == "focal":
        objectness = focal_loss(logits, wanted, config.focal_alpha, config.focal_gamma) / count
    else:
        total = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        objectness = total / counted.sum().clamp(min=1)
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


class ProposalRecall(NamedTuple):
    """How many boxes there were, and how many of them some proposal covers."""

    covered: int
    boxes: int

    def plus(self, other: ProposalRecall) -> ProposalRecall:
        """Return both counts added, over slices and scans."""
        return ProposalRecall(self.covered + other.covered, self.boxes + other.boxes)

    @property
    def share(self) -> float | None:
        """The recall, 0..1; None without boxes."""
        return self.covered / self.boxes if self.boxes else None


def proposal_recall(
    proposals: Sequence[Tensor], boxes: Sequence[Tensor], iou_thresh: float = 0.5
) -> ProposalRecall:
    """Count the ``boxes`` of each image that a proposal of the same image overlaps by ``iou_thresh``."""
    total = ProposalRecall(0, 0)
    for given, wanted in zip(proposals, boxes, strict=True):
        overlaps = box_iou(wanted, given) if len(given) else wanted.new_zeros(len(wanted), 1)
        covered = int((overlaps.amax(dim=1) >= iou_thresh).sum())
        total = total.plus(ProposalRecall(covered, len(wanted)))
    return total
