"""What training minimises: the losses of a batch of raw detections against its targets."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvision.models.box_coder import encode_boxes
from medvision.models.box_losses import Placed, paired_iou
from medvision.models.choices import BOX_LOSSES, LESION_LOSSES, MATCHERS, find_choice
from medvision.models.config import RetinaNetConfig
from medvision.models.lesion_losses import Judged
from medvision.models.matcher import BACKGROUND, IGNORED, ignore_inside
from medvision.models.retinanet import RawDetections


class Target(TypedDict):
    """The truth of one stack, in torchvision's keys; boxes are x1, y1, x2, y2 in pixels."""

    boxes: Tensor  # [n, 4]
    labels: Tensor  # [n], 0 is the first class
    ignored: Tensor  # [m, 4]: regions that are neither lesion nor background


class Criterion(nn.Module):
    """Lesion loss on all anchors, box and class loss on those that stand for a lesion.

    By default focal loss, GIoU and cross-entropy, on anchors matched by ATSS.
    """

    def __init__(self, config: RetinaNetConfig, class_weights: Tensor) -> None:
        super().__init__()
        self.config = config
        self._match = find_choice(MATCHERS, config.matcher)
        self._lesion_loss = find_choice(LESION_LOSSES, config.lesion_loss)
        self._box_loss = find_choice(BOX_LOSSES, config.box_loss)
        self.register_buffer("class_weights", class_weights)
        self.class_weights: Tensor

    def forward(self, raw: RawDetections, targets: list[Target]) -> dict[str, Tensor]:
        """Return the weighted losses, each divided by the number of positive anchors in the batch.

        A batch without any lesion is divided by 1, its box and class losses are zero.
        """
        flat = torch.cat(raw.anchors)
        matches = []
        for target in targets:
            matched = self._match(raw.anchors, target["boxes"], self.config)
            matches.append(ignore_inside(flat, matched, target["ignored"]))
        matched = torch.stack(matches)
        positive = matched > BACKGROUND
        count = positive.sum().clamp(min=1)
        boxes, labels = _of_positives(matched, positive, targets)
        placed = _placed(raw, flat, positive, boxes)
        overlap = paired_iou(placed.predicted.detach(), boxes)
        judged = Judged(raw.lesion_logits, positive, matched != IGNORED, overlap)
        lesion = self._lesion_loss(judged, self.config)
        box = self._box_loss(placed, self.config)
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


def class_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the summed cross-entropy of ``[n, classes]`` logits; ``weights`` evens rare classes out."""
    return functional.cross_entropy(logits, labels, weight=weights, reduction="sum")
