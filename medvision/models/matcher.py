"""Which anchors stand for which lesion: adaptive training sample selection (ATSS) or IoU thresholds."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from medvision.models.config import RetinaNetConfig

BACKGROUND = -1
IGNORED = -2

_NEAREST = 9
"""Anchors a level in reach of a lesion that the IoU matcher left without one."""


def match_atss(anchors: list[Tensor], boxes: Tensor, candidates: int) -> Tensor:
    """Return for each anchor of all levels the index of its box, or BACKGROUND.

    Zhang et al., Bridging the Gap Between Anchor-based and Anchor-free Detection, CVPR 2020: for each
    box the ``candidates`` anchors of every level whose centres are nearest; those whose IoU reaches the
    mean plus the deviation of all candidates, and whose centre lies in the box, are positive. A box that
    no anchor centre falls into, as happens under a stride's size, gets its best candidate, and one whose
    best candidate went to another box its next: no lesion is passed over for being small or close
    to another. ``boxes`` is ``[n, 4]`` x1, y1, x2, y2.

    Two things differ from the authors' code. It takes ``candidates`` times the number of shapes at a
    place, here the shapes share the ``candidates`` (with one shape, as in the paper, it is the same).
    Its deviation divides by one less than the number of candidates, here by their number. Which of the
    anchors that are equally far comes last among the candidates is left to ``topk``.
    """
    everything = torch.cat(anchors)
    matched = torch.full((len(everything),), BACKGROUND, dtype=torch.long, device=boxes.device)
    if len(boxes) == 0:
        return matched
    overlaps = box_iou(everything, boxes)  # [anchors, boxes]
    chosen = _candidates(anchors, boxes, candidates)  # [candidates, boxes]
    overlap = overlaps.gather(0, chosen)
    threshold = overlap.mean(dim=0) + overlap.std(dim=0, correction=0)
    positive = (overlap >= threshold) & _centers_inside(everything, boxes, chosen)
    # A candidate without any overlap teaches nothing but the wrong box.
    positive &= overlap > 0
    best = overlap.argmax(dim=0)
    positive[best, torch.arange(len(boxes), device=boxes.device)] = True
    matched = _resolve(overlaps, chosen, positive, matched)
    return _serve_left_out(overlaps, chosen, matched)


def match_iou(
    anchors: list[Tensor],
    boxes: Tensor,
    fg_iou_thresh: float,
    bg_iou_thresh: float,
    low_quality_matches: bool = True,
) -> Tensor:
    """Return for each anchor of all levels the index of its box, BACKGROUND or IGNORED.

    An anchor belongs to the box it overlaps most: positive from an IoU of ``fg_iou_thresh``, background under
    ``bg_iou_thresh``, ignored in between (Ren et al., Faster R-CNN, NeurIPS 2015; 0.5 and 0.4 in RetinaNet).
    With ``low_quality_matches`` an anchor that some box overlaps most is positive whatever the IoU, and a
    box that still has none gets a near one: a lesion of a few pixels reaches 0.5 with no anchor.
    ``boxes`` is ``[n, 4]`` x1, y1, x2, y2.
    """
    everything = torch.cat(anchors)
    if len(boxes) == 0:
        return boxes.new_full((len(everything),), BACKGROUND, dtype=torch.long)
    overlaps = box_iou(everything, boxes)  # [anchors, boxes]
    overlap, nearest = overlaps.max(dim=1)
    matched = torch.where(overlap < bg_iou_thresh, BACKGROUND, IGNORED)
    matched = torch.where(overlap >= fg_iou_thresh, nearest, matched)
    if not low_quality_matches:
        return matched
    highest = overlaps.max(dim=0).values
    # Without the second condition a box that no anchor meets would claim all anchors that meet nothing.
    best = ((overlaps == highest) & (highest > 0)).any(dim=1)
    matched = torch.where(best, nearest, matched)
    return _serve_left_out(overlaps, _candidates(anchors, boxes, _NEAREST), matched)


def _candidates(anchors: list[Tensor], boxes: Tensor, count: int) -> Tensor:
    target = (boxes[:, :2] + boxes[:, 2:]) / 2
    picks, start = [], 0
    for level in anchors:
        centers = (level[:, :2] + level[:, 2:]) / 2
        distance = torch.cdist(centers, target)
        picks.append(distance.topk(min(count, len(level)), dim=0, largest=False).indices + start)
        start += len(level)
    return torch.cat(picks)


def _centers_inside(anchors: Tensor, boxes: Tensor, chosen: Tensor) -> Tensor:
    centers = ((anchors[:, :2] + anchors[:, 2:]) / 2)[chosen]  # [candidates, boxes, 2]
    return ((centers > boxes[None, :, :2]) & (centers < boxes[None, :, 2:])).all(dim=2)


def _resolve(overlaps: Tensor, chosen: Tensor, positive: Tensor, matched: Tensor) -> Tensor:
    # An anchor claimed by several boxes goes to the one it overlaps most.
    claimed = torch.full_like(overlaps, -1.0)
    rank, box = torch.nonzero(positive, as_tuple=True)
    anchor = chosen[rank, box]
    claimed[anchor, box] = overlaps[anchor, box]
    value, index = claimed.max(dim=1)
    return torch.where(value >= 0, index, matched)


def _serve_left_out(overlaps: Tensor, chosen: Tensor, matched: Tensor) -> Tensor:
    """Give each box without an anchor the best candidate that no other box depends on."""
    counts = torch.bincount(matched[matched >= 0], minlength=overlaps.shape[1]).tolist()
    for box in (number for number, count in enumerate(counts) if count == 0):
        anchors = chosen[:, box]
        for anchor in anchors[overlaps[anchors, box].argsort(descending=True)].tolist():
            owner = int(matched[anchor])
            free = owner in (BACKGROUND, IGNORED)
            if free or counts[owner] > 1:
                matched[anchor] = box
                counts[box] += 1
                if not free:
                    counts[owner] -= 1
                break
    return matched


def by_atss(anchors: list[Tensor], boxes: Tensor, config: RetinaNetConfig) -> Tensor:
    """Match as :func:`match_atss` does, with the settings' number of candidates."""
    return match_atss(anchors, boxes, config.atss_candidates)


def by_iou(anchors: list[Tensor], boxes: Tensor, config: RetinaNetConfig) -> Tensor:
    """Match as :func:`match_iou` does, with the settings' thresholds."""
    low = config.low_quality_matches
    return match_iou(anchors, boxes, config.fg_iou_thresh, config.bg_iou_thresh, low)


def ignore_inside(anchors: Tensor, matched: Tensor, regions: Tensor) -> Tensor:
    """Return ``matched`` with background anchors centred in a region marked IGNORED.

    ``regions`` is ``[n, 4]``: lesions cut by the crop's edge, first and last faint slices, and what the
    reader marked to be ignored. They are neither lesion nor background.
    """
    if len(regions) == 0:
        return matched
    centers = ((anchors[:, :2] + anchors[:, 2:]) / 2)[:, None]
    inside = ((centers >= regions[None, :, :2]) & (centers < regions[None, :, 2:])).all(dim=2)
    return torch.where(inside.any(dim=1) & (matched == BACKGROUND), IGNORED, matched)
