"""Raw detections -> the few boxes of each slice worth keeping."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torchvision.ops import nms

from medvision.models.retinanet import RawDetections


class Detections(TypedDict):
    """The boxes of one slice, by falling score. Pixels of the network's picture."""

    boxes: Tensor  # [n, 4] x1, y1, x2, y2
    scores: Tensor  # [n], 0..1: is it a lesion
    class_probabilities: Tensor  # [n, classes], rows sum to 1: of which class, if so


def select_detections(
    raw: RawDetections,
    *,
    score_thresh: float,
    nms_thresh: float,
    detections_per_img: int,
    topk_candidates: int = 200,
) -> list[Detections]:
    """Keep per slice the best candidates above ``score_thresh`` that do not overlap a better one.

    Two boxes overlap if their IoU is above ``nms_thresh``, whatever their class: a lesion is there once.
    """
    selected: list[Detections] = []
    scores = raw.lesion_logits.sigmoid()
    for index, slice_scores in enumerate(scores):
        most = min(max(topk_candidates, detections_per_img), len(slice_scores))
        best, order = slice_scores.topk(most)
        order = order[best > score_thresh]
        boxes = raw.boxes[index, order]
        kept = order[nms(boxes, slice_scores[order], nms_thresh)[:detections_per_img]]
        selected.append(
            {
                "boxes": raw.boxes[index, kept],
                "scores": slice_scores[kept],
                "class_probabilities": torch.softmax(raw.class_logits[index, kept], dim=-1),
            }
        )
    return selected
