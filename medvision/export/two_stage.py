"""A two-stage network in a form that graphs can have: no step makes a list of unknown length.

Between its stages Faster R-CNN keeps as many boxes as there happen to be. A graph for any image size cannot be
drawn through that, so here every list has its full length, and what is not a box scores less than 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, nms

from medvision.models.box_coder import decode_boxes
from medvision.models.faster_rcnn import DELTA_SCALE, FasterRCNN
from medvision.models.mask_head import paste_masks, pick_class
from medvision.models.proposals import SMALLEST_SIDE, RawProposals
from medvision.models.roi_levels import LevelPooling, roi_levels

NO_BOX = -1.0
"""Score of an entry that only fills a list up."""


class FixedLengths(nn.Module):
    """Finds the boxes of one slice with the parts of a FasterRCNN; the same ones, padded to one length."""

    def __init__(
        self,
        network: FasterRCNN,
        *,
        score_thresh: float,
        nms_thresh: float,
        detections_per_img: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.most = min(detections_per_img, network.config.proposals.post_nms_top_n)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Take ``[1, slice, row, column]`` to boxes, scores, class probabilities and, if there are, masks.

        Entries past the last box that was found have the score ``NO_BOX``.
        """
        network, size = self.network, (images.shape[-2], images.shape[-1])
        maps = network.backbone(network.windows(images))[-network.n_maps :]
        levels = network.pyramid(maps)
        objectness, deltas = network.proposal_head(levels)
        raw = RawProposals(objectness, deltas, network.anchors_of(levels))
        regions, is_region = self._propose(raw, size)
        logits, deltas = network.box_head(pool_levels(network.box_pool, levels, regions))
        boxes = decode_boxes(deltas / deltas.new_tensor(DELTA_SCALE), regions)
        boxes = clip_boxes_to_image(boxes, size)
        scores = torch.where(is_region, 1 - logits.softmax(dim=-1)[:, 0], NO_BOX)
        kept, is_kept = keep_best(boxes, scores, self.nms_thresh, self.most)
        good = is_kept & (scores[kept] > self.score_thresh)
        classes = logits[kept, 1:].softmax(dim=-1)
        found = (boxes[kept], torch.where(good, scores[kept], NO_BOX), classes)
        if network.mask_branch is None:
            return found
        branch: Any = network.mask_branch
        drawn = branch.head(pool_levels(branch.pool, levels, boxes[kept]))
        shares = pick_class(drawn, classes.argmax(dim=1)).sigmoid()
        return (*found, paste_masks(shares, boxes[kept], size) >= branch.config.mask_thresh)

    def _propose(self, raw: RawProposals, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return ``[post_nms_top_n, 4]`` boxes by falling objectness, and which of them are any."""
        config = self.network.config.proposals
        boxes, scores, first = [], [], 0
        for anchors in raw.anchors:
            last = first + anchors.shape[0]
            part = slice(first, last)
            best, order = fill(raw.objectness[0, part], config.pre_nms_top_n, -torch.inf).topk(
                config.pre_nms_top_n
            )
            order = order.clamp(max=anchors.shape[0] - 1)
            boxes.append(decode_boxes(raw.deltas[0, part][order], anchors[order]))
            scores.append(torch.where(best > -torch.inf, best.sigmoid(), NO_BOX))
            first = last
        cut = clip_boxes_to_image(torch.cat(boxes), size)
        good = ((cut[:, 2:] - cut[:, :2]) >= SMALLEST_SIDE).all(dim=1)
        score = torch.where(good, torch.cat(scores), NO_BOX)
        cut = torch.where(good[:, None], cut, 0.0)
        level = torch.arange(len(boxes)).repeat_interleave(config.pre_nms_top_n)
        # Levels are moved apart, so that boxes of two of them never overlap.
        apart = cut + (level.to(cut) * (cut.max() + 1))[:, None]
        kept, is_kept = keep_best(apart, score, config.nms_thresh, config.post_nms_top_n)
        return cut[kept], is_kept


def pool_levels(pooling: LevelPooling, levels: list[Tensor], boxes: Tensor) -> Tensor:
    """Return what ``pooling`` gives for one image: every box is pooled from every level, one is taken.

    To sort the boxes by level first would be less work, and makes lists of unknown length.
    """
    chosen = roi_levels(boxes, pooling.k0, pooling.canonical_size, pooling.levels)
    rois = torch.cat((torch.zeros_like(boxes[:, :1]), boxes), dim=1)
    taken = None
    for index, (features, stride) in enumerate(zip(levels, pooling.strides, strict=True)):
        pooled = pooling.pool(features.float(), rois, 1.0 / stride)
        here = (chosen == index)[:, None, None, None]
        taken = pooled if taken is None else torch.where(here, pooled, taken)
    if taken is None:
        raise ValueError("A pyramid has at least one level.")
    return taken


def keep_best(boxes: Tensor, scores: Tensor, overlap: float, most: int) -> tuple[Tensor, Tensor]:
    """Return ``[most]`` indices that NMS keeps, by falling score, and which are boxes (score 0 or more)."""
    kept = fill(nms(boxes, scores, overlap), most, -1)[:most]
    index = kept.clamp(min=0)
    return index, (kept >= 0) & (scores[index] >= 0)


def fill(values: Tensor, count: int, value: float) -> Tensor:
    """Return ``[n]`` values with ``count`` times ``value`` behind them."""
    return torch.cat((values, values.new_full((count,), value)))
