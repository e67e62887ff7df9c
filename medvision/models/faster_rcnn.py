"""Faster R-CNN for slice stacks: propose regions, then look at each of them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import clip_boxes_to_image, nms

from medvision.errors import UsageError
from medvision.models.anchors import level_anchors
from medvision.models.backbone import Backbone
from medvision.models.backbones import make_backbone, pyramid_channels
from medvision.models.box_coder import decode_boxes, encode_boxes
from medvision.models.choices import REGION_HEADS, REGION_LOSSES, find_choice
from medvision.models.mask_head import (
    MaskBranch,
    MaskDetections,
    MaskHead,
    MaskTarget,
    RawMasks,
    mask_loss,
)
from medvision.models.proposal_training import (
    SMOOTH_L1_BETA,
    boxes_of,
    match_anchors,
    proposal_losses,
)
from medvision.models.proposals import ProposalHead, RawProposals, select_proposals
from medvision.models.pyramid import FeaturePyramid
from medvision.models.pyramid_config import FINEST_STRIDE
from medvision.models.region_heads import RegionHead
from medvision.models.region_training import hardest_regions, match_regions, region_class_loss
from medvision.models.retinanet import InnerWindows
from medvision.models.roi_levels import POOLINGS, LevelPooling, RoIAlign
from medvision.models.two_stage_config import MaskRCNNConfig, TwoStageConfig

DELTA_SCALE = (10.0, 10.0, 5.0, 5.0)
"""The second stage's deltas are small; scaled so they have a deviation of about 1 (Fast R-CNN's code)."""


class Matches(NamedTuple):
    """What anchors and regions stand for: the index of a target's box, BACKGROUND or IGNORED."""

    anchors: Tensor  # [batch, anchors]
    regions: list[Tensor]  # each image's [n_i]


class RawRegions(NamedTuple):
    """What both stages say of a batch; the regions of all images one after another."""

    proposals: RawProposals
    levels: list[Tensor]  # pyramid maps [batch, channel, row, column], finest first
    size: tuple[int, int]  # rows, columns of the images
    regions: list[Tensor]  # each image's boxes [n_i, 4], by falling objectness if not sampled
    logits: Tensor  # [regions, 1 + classes]: background first
    deltas: Tensor  # [regions, 4]: corrections of the regions
    masks: RawMasks | None = None  # in training, with a mask head
    matches: Matches | None = None  # in training


class FasterRCNN(nn.Module):
    """Two-stage detector: backbone and pyramid once, proposals, then each region by itself.

    Ren et al., Faster R-CNN, NeurIPS 2015; on a feature pyramid: Lin et al., CVPR 2017; with
    ``mask_branch``: He et al., Mask R-CNN, ICCV 2017. The second stage is the papers' softmax over background
    and classes. The lesion score is 1 - background, and of which class the softmax over the classes
    alone: the two answers of docs/decisions/0002, as the first is the sum over classes and none is lost
    for being split between them. NMS runs on it once, not class by class.
    """

    def __init__(
        self,
        config: TwoStageConfig,
        windows: nn.Module,
        backbone: Backbone,
        pyramid: FeaturePyramid,
        proposal_head: ProposalHead,
        box_pool: LevelPooling,
        box_head: RegionHead,
        mask_branch: MaskBranch | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.windows = windows
        self.backbone = backbone
        self.pyramid = pyramid
        self.proposal_head = proposal_head
        self.box_pool, self.box_head = box_pool, box_head
        self.mask_branch = mask_branch
        strides = [stride for stride in backbone.strides if stride >= FINEST_STRIDE]
        self.n_maps = len(strides)
        self.strides = strides[: pyramid.levels]
        for index, shapes in enumerate(config.anchor_sizes):
            self.register_buffer(f"anchor_sizes_{index}", torch.tensor(shapes), persistent=False)
        # Seeds what is drawn and is saved with the weights: a resumed run draws as one never stopped.
        self.register_buffer("draws", torch.randint(2**31, ()))
        self.draws: Tensor

    def forward(self, images: Tensor, targets: Sequence[MaskTarget] | None = None) -> RawRegions:
        """Take ``[batch, slice, row, column]`` in 0..1 to raw regions; with ``targets`` those to train on.

        Rows and columns must be multiples of the coarsest stride.
        """
        size = (images.shape[-2], images.shape[-1])
        maps = self.backbone(self.windows(images))[-self.n_maps :]
        levels = self.pyramid(maps)
        objectness, moves = self.proposal_head(levels)
        raw = RawProposals(objectness, moves, self.anchors_of(levels))
        settings, matches, masks = self.config.proposals, None, None
        if targets is None:
            regions = select_proposals(raw, size, settings, settings.post_nms_top_n)
        else:
            regions = select_proposals(raw, size, settings, settings.post_nms_top_n_training)
            regions, matches = self._match(raw, regions, targets)
            if self.mask_branch is not None:
                masks = self.mask_branch(levels, regions, matches.regions, targets)
        logits, deltas = self.box_head(self.box_pool(levels, regions))
        return RawRegions(raw, levels, size, regions, logits, deltas, masks, matches)

    def anchors_of(self, levels: list[Tensor]) -> list[Tensor]:
        """Return the anchors ``[anchors of the level, 4]`` of each level ``[batch, channel, row, column]``."""
        return [
            level_anchors(
                (level.shape[-2], level.shape[-1]), stride, self.get_buffer(f"anchor_sizes_{index}")
            )
            for index, (level, stride) in enumerate(zip(levels, self.strides, strict=True))
        ]

    @torch.no_grad()
    def _match(
        self, raw: RawProposals, proposals: list[Tensor], targets: Sequence[MaskTarget]
    ) -> tuple[list[Tensor], Matches]:
        """Add the true boxes to the proposals, match both stages and draw what is trained on."""
        generator = torch.Generator().manual_seed(int(self.draws))
        if self.training:
            self.draws += 1
        anchors = match_anchors(raw.anchors, targets, self.config.proposals, generator)
        regions, matched = [], []
        for boxes, target in zip(proposals, targets, strict=True):
            boxes = torch.cat((boxes, target["boxes"].to(boxes)))
            chosen, row = match_regions(boxes, target, self.config.regions, generator)
            regions.append(boxes[chosen])
            matched.append(row)
        return regions, Matches(anchors, matched)

    @torch.no_grad()
    def select(
        self, raw: RawRegions, *, score_thresh: float, nms_thresh: float, detections_per_img: int
    ) -> list[MaskDetections]:
        """Keep per slice the boxes above ``score_thresh`` that do not overlap a better one; add masks.

        Masks are computed for the boxes that are kept alone. ``nms_thresh`` is an IoU.
        """
        counts = [len(boxes) for boxes in raw.regions]
        scale = raw.deltas.new_tensor(DELTA_SCALE)
        found: list[MaskDetections] = []
        for regions, logits, deltas in zip(
            raw.regions, raw.logits.split(counts), raw.deltas.split(counts), strict=True
        ):
            boxes = clip_boxes_to_image(decode_boxes(deltas / scale, regions), raw.size)
            scores = 1 - logits.softmax(dim=-1)[:, 0]
            above = torch.where(scores > score_thresh)[0]
            kept = above[nms(boxes[above], scores[above], nms_thresh)[:detections_per_img]]
            classes = logits[kept, 1:].softmax(dim=-1)
            found.append(
                {"boxes": boxes[kept], "scores": scores[kept], "class_probabilities": classes}
            )
        if self.mask_branch is not None:
            self.mask_branch.outline(raw.levels, found, raw.size)
        return found


class FasterRCNNCriterion(nn.Module):
    """The losses of both stages, and of the masks if there is a mask head; all trained at once."""

    def __init__(self, config: TwoStageConfig, class_weights: Tensor) -> None:
        """Weigh lesions of each class by ``class_weights`` ``[classes]``, background by 1."""
        super().__init__()
        self.config = config
        self.register_buffer("weights", torch.cat((class_weights.new_ones(1), class_weights)))
        self.weights: Tensor

    def forward(self, raw: RawRegions, targets: Sequence[MaskTarget]) -> dict[str, Tensor]:
        """Return ``objectness``, ``proposal_box``, ``class``, ``box`` and, with a mask head, ``mask``.

        Finite without any lesion: the box and mask losses are then zero.
        """
        if raw.matches is None:
            raise UsageError("Losses need outputs computed with targets: network(images, targets).")
        losses = proposal_losses(raw.proposals, raw.matches.anchors, targets, self.config.proposals)
        losses.update(self._region_losses(raw, raw.matches.regions, targets))
        if raw.masks is not None and isinstance(self.config, MaskRCNNConfig):
            losses["mask"] = self.config.mask.weight * mask_loss(raw.masks, targets)
        return losses

    def _region_losses(
        self, raw: RawRegions, matched: list[Tensor], targets: Sequence[MaskTarget]
    ) -> dict[str, Tensor]:
        settings = self.config.regions
        flat = torch.cat(matched)
        positive = flat >= 0
        labels = torch.zeros_like(flat)
        labels[positive] = 1 + torch.cat(
            [target["labels"][row[row >= 0]] for row, target in zip(matched, targets, strict=True)]
        )
        category = region_class_loss(raw.logits, labels, self.weights, settings)
        wanted = encode_boxes(boxes_of(matched, targets), torch.cat(raw.regions)[positive])
        wanted = wanted * wanted.new_tensor(DELTA_SCALE)
        box = torch.zeros_like(category)
        box[positive] = functional.smooth_l1_loss(
            raw.deltas[positive], wanted, reduction="none", beta=SMOOTH_L1_BETA
        ).sum(dim=1)
        if settings.sampling == "ohem":
            cost = category + settings.box_weight * box
            kept = hardest_regions(cost, raw.regions, settings)
            category, box, positive = category[kept], box[kept], positive[kept]
        # Both by the same number, or lesions' features would serve the box alone and be lost to the class.
        by_lesions = find_choice(REGION_LOSSES, settings.loss).by_lesions
        count = positive.sum().clamp(min=1) if by_lesions else max(len(positive), 1)
        return {"class": category.sum() / count, "box": settings.box_weight * box.sum() / count}


def build_faster_rcnn(config: TwoStageConfig, n_slices: int, classes: int) -> FasterRCNN:
    """Assemble the detector that ``config`` describes; anchors and level rule must have been fitted."""
    rule, regions, channels = config.level_rule, config.regions, config.pyramid_channels
    if rule.k0 is None or rule.canonical_size is None or not config.anchor_sizes:
        raise UsageError(
            "anchor_sizes and level_rule must be fitted before the network is built; they are not set.",
            do="Use fit_anchor_sizes and fit_level_rule on the training boxes.",
        )
    windows = InnerWindows(config.inner_windows)
    in_channels = n_slices * (1 + len(config.inner_windows))
    backbone = make_backbone(config, in_channels)
    pyramid = FeaturePyramid(pyramid_channels(backbone), channels, config.pyramid)
    proposal_head = ProposalHead(channels, config.anchors_per_level, config.proposals)
    level_rule = (config.strides, rule.k0, rule.canonical_size)
    pooling = POOLINGS[regions.pooling](channels, regions.pool_size, regions.sampling_ratio)
    make_head = find_choice(REGION_HEADS, regions.head)
    box_head = make_head(channels, regions.pool_size, regions.width, classes)
    branch = None
    if isinstance(config, MaskRCNNConfig):
        mask = config.mask
        pool = LevelPooling(*level_rule, RoIAlign(mask.pool_size, regions.sampling_ratio))
        head = MaskHead(channels, mask.channels, mask.depth, classes if mask.per_class else 1)
        branch = MaskBranch(pool, head, mask)
    box_pool = LevelPooling(*level_rule, pooling)
    return FasterRCNN(config, windows, backbone, pyramid, proposal_head, box_pool, box_head, branch)
