"""What training minimises: the losses of a batch of raw detections against its targets."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn

from medvision.models.config import RetinaNetConfig
from medvision.models.losses import box_loss, class_loss, focal_loss
from medvision.models.matcher import BACKGROUND, IGNORED, ignore_inside, match_atss
from medvision.models.retinanet import RawDetections


class Target(TypedDict):
    """The truth of one stack, in torchvision's keys; boxes are x1, y1, x2, y2 in pixels."""

    boxes: Tensor  # [n, 4]
    labels: Tensor  # [n], 0 is the first class
    ignored: Tensor  # [m, 4]: regions that are neither lesion nor background


class Criterion(nn.Module):
    """Focal loss on all anchors, GIoU and class loss on those that stand for a lesion."""

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
            matched = match_atss(raw.anchors, target["boxes"], self.config.atss_candidates)
            matches.append(ignore_inside(flat, matched, target["ignored"]))
        matched = torch.stack(matches)
        positive = matched > BACKGROUND
        count = positive.sum().clamp(min=1)
        counted = matched != IGNORED
        lesion = focal_loss(
            raw.lesion_logits[counted],
            positive[counted].float(),
            self.config.focal_alpha,
            self.config.focal_gamma,
        )
        boxes, labels = _of_positives(matched, positive, targets)
        box = box_loss(raw.boxes[positive], boxes)
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
