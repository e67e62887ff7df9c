"""What training minimises: the losses of a batch of raw detections against its targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from medvision.models.box_coder import encode_boxes
from medvision.models.config import RetinaNetConfig
from medvision.models.losses import (
    balanced_cross_entropy,
    box_loss,
    class_loss,
    diou_loss,
    focal_loss,
    hard_negative_loss,
    paired_iou,
    smooth_l1_loss,
    varifocal_loss,
)
from medvision.models.matcher import BACKGROUND, IGNORED, ignore_inside, match_atss, match_iou
from medvision.models.retinanet import RawDetections


class Target(TypedDict):
    """The truth of one stack, in torchvision's keys; boxes are x1, y1, x2, y2 in pixels."""

    boxes: Tensor  # [n, 4]
    labels: Tensor  # [n], 0 is the first class
    ignored: Tensor  # [m, 4]: regions that are neither lesion nor background


class Judged(NamedTuple):
    """The lesion logits of a batch and what is true of each anchor."""

    logits: Tensor  # [batch, anchors]
    positive: Tensor  # [batch, anchors] bool: stands for a lesion
    counted: Tensor  # [batch, anchors] bool: is lesion or background, not to be ignored
    overlap: Tensor  # [positives]: IoU of the predicted box with that of the lesion


class Placed(NamedTuple):
    """The boxes of the positive anchors of a batch, all ``[positives, 4]``."""

    predicted: Tensor
    deltas: Tensor
    anchors: Tensor
    target: Tensor


class Criterion(nn.Module):
    """Lesion loss on all anchors, box and class loss on those that stand for a lesion.

    By default focal loss, GIoU and cross-entropy, on anchors matched by ATSS.
    """

    def __init__(self, config: RetinaNetConfig, class_weights: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("class_weights", class_weights)
        self.class_weights: Tensor

    def forward(self, raw: RawDetections, targets: list[Target]) -> dict[str, Tensor]:
        """Return the weighted losses, each divided by the number of positive anchors in the batch.

        A batch without any lesion is divided by 1, its box and class losses are zero.
        """
        flat = torch.cat(raw.anchors)
        matches = []
        for target in targets:
            matched = MATCHERS[self.config.matcher](raw.anchors, target["boxes"], self.config)
            matches.append(ignore_inside(flat, matched, target["ignored"]))
        matched = torch.stack(matches)
        positive = matched > BACKGROUND
        count = positive.sum().clamp(min=1)
        boxes, labels = _of_positives(matched, positive, targets)
        placed = _placed(raw, flat, positive, boxes)
        overlap = paired_iou(placed.predicted.detach(), boxes)
        judged = Judged(raw.lesion_logits, positive, matched != IGNORED, overlap)
        lesion = LESION_LOSSES[self.config.lesion_loss](judged, self.config)
        box = BOX_LOSSES[self.config.box_loss](placed, self.config)
        category = class_loss(raw.class_logits[positive], labels, self.class_weights)
        return {
            "lesion": lesion / count,
            "box": self.config.box_weight * box / count,
            "class": self.config.class_weight * category / count,
        }


def _of_positives(
    matched: Tensor, positive: Tensor, targets: list[Target]
) -> tuple[Tensor, Tensor]:
    boxes, labels = [], []
    for row, mask, target in zip(matched, positive, targets, strict=True):
        boxes.append(target["boxes"][row[mask]])
        labels.append(target["labels"][row[mask]])
    return torch.cat(boxes), torch.cat(labels)


def _placed(raw: RawDetections, flat: Tensor, positive: Tensor, boxes: Tensor) -> Placed:
    predicted = raw.boxes[positive]
    anchors = flat[positive.nonzero()[:, 1]]
    deltas = encode_boxes(predicted, anchors) if raw.deltas is None else raw.deltas[positive]
    return Placed(predicted, deltas, anchors, boxes)


def _focal(judged: Judged, config: RetinaNetConfig) -> Tensor:
    targets = judged.positive[judged.counted].float()
    logits = judged.logits[judged.counted]
    return focal_loss(logits, targets, config.focal_alpha, config.focal_gamma)


def _balanced(judged: Judged, config: RetinaNetConfig) -> Tensor:
    targets = judged.positive[judged.counted].float()
    return balanced_cross_entropy(judged.logits[judged.counted], targets, config.balanced_alpha)


def _hard_negative(judged: Judged, config: RetinaNetConfig) -> Tensor:
    kept = config.negatives_per_positive
    return hard_negative_loss(judged.logits, judged.positive, judged.counted, kept)


def _varifocal(judged: Judged, config: RetinaNetConfig) -> Tensor:
    quality = torch.zeros_like(judged.logits)
    quality[judged.positive] = judged.overlap.to(quality.dtype)
    logits, quality = judged.logits[judged.counted], quality[judged.counted]
    return varifocal_loss(logits, quality, config.varifocal_alpha, config.varifocal_gamma)


LESION_LOSSES: dict[str, Callable[[Judged, RetinaNetConfig], Tensor]] = {
    "focal": _focal,
    "balanced-cross-entropy": _balanced,
    "hard-negative-mining": _hard_negative,
    "varifocal": _varifocal,
}

BOX_LOSSES: dict[str, Callable[[Placed, RetinaNetConfig], Tensor]] = {
    "giou": lambda placed, _: box_loss(placed.predicted, placed.target),
    "diou": lambda placed, _: diou_loss(placed.predicted, placed.target),
    "smooth-l1": lambda placed, config: smooth_l1_loss(
        placed.deltas, encode_boxes(placed.target, placed.anchors), config.smooth_l1_beta
    ),
}

MATCHERS: dict[str, Callable[[list[Tensor], Tensor, RetinaNetConfig], Tensor]] = {
    "atss": lambda anchors, boxes, config: match_atss(anchors, boxes, config.atss_candidates),
    "iou": lambda anchors, boxes, config: match_iou(
        anchors, boxes, config.fg_iou_thresh, config.bg_iou_thresh, config.low_quality_matches
    ),
}
