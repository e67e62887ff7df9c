"""Region proposals: the few boxes of a slice that are worth a second look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from medvision.models.anchors import per_anchor
from medvision.models.box_coder import decode_boxes
from medvision.models.choices import PROPOSAL_LOSSES, find_choice
from medvision.models.heads import PRIOR
from medvision.models.two_stage_config import ProposalConfig

SMALLEST_SIDE = 1e-3
"""Proposals with a shorter side, pixels, are no boxes."""


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
        drawn = find_choice(PROPOSAL_LOSSES, config.loss).drawn
        if not drawn and self.objectness.bias is not None:
            # At the start every anchor is a lesion with 1 percent, as in the RetinaNet's head.
            nn.init.constant_(self.objectness.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Take pyramid levels to objectness ``[batch, anchors]`` and deltas ``[batch, anchors, 4]``."""
        logits, deltas = [], []
        for features in maps:
            for convolution in self.convolutions:
                features = functional.relu(convolution(features))
            logits.append(per_anchor(self.objectness(features), 1))
            deltas.append(per_anchor(self.box(features), 4))
        return torch.cat(logits, dim=1)[..., 0].float(), torch.cat(deltas, dim=1).float()


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
