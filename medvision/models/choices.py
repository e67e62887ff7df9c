"""What settings choose by name, and where it is written; read without torch.

A new backbone, head, loss or matcher is a file of its own and a line here: settings, their schema, the
messages that list the names, and training follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

NARROW = "resnet18-narrow"
"""Name of the ResNet of basic blocks whose ``blocks`` and ``width`` are settings."""

# name, number of input channels, with the pooling after the stem -> medvision.models.backbone.Backbone
BACKBONES = {
    NARROW: "medvision.models.backbone:build_narrow",
    "resnet18": "medvision.models.resnet:ResNetFeatures",
    "resnet34": "medvision.models.resnet:ResNetFeatures",
    "resnet50": "medvision.models.resnet:ResNetFeatures",
    "resnet101": "medvision.models.resnet:ResNetFeatures",
    "resnet152": "medvision.models.resnet:ResNetFeatures",
}
# channels, depth, pyramid levels, anchors a place, classes -> medvision.models.heads.Head
HEADS = {
    "separate": "medvision.models.heads:SeparateTowers",
    "shared": "medvision.models.heads:SharedTower",
}
# medvision.models.lesion_losses.Judged, settings -> sum over the anchors that count
LESION_LOSSES = {
    "focal": "medvision.models.lesion_losses:focal",
    "balanced-cross-entropy": "medvision.models.lesion_losses:balanced",
    "hard-negative-mining": "medvision.models.lesion_losses:hard_negative",
    "varifocal": "medvision.models.lesion_losses:varifocal",
}
# medvision.models.box_losses.Placed, settings -> sum over the positive anchors
BOX_LOSSES = {
    "giou": "medvision.models.box_losses:giou",
    "diou": "medvision.models.box_losses:diou",
    "smooth-l1": "medvision.models.box_losses:smooth_l1",
}
# logits [batch, channel, row, column], segmentation_losses.SegmentationTruth, settings -> loss. A setting of
# this name, in SegmentationLossConfig, is its weight.
SEGMENTATION_LOSSES = {
    "dice": "medvision.models.segmentation_losses:dice_loss",
    "cross_entropy": "medvision.models.segmentation_losses:cross_entropy_loss",
    "focal": "medvision.models.segmentation_losses:focal_loss",
    "tversky": "medvision.models.segmentation_losses:tversky_loss",
    "focal_tversky": "medvision.models.segmentation_losses:focal_tversky_loss",
}
# anchors of each level, boxes [n, 4], settings -> for each anchor the index of its box, or a code
MATCHERS = {
    "atss": "medvision.models.matcher:by_atss",
    "iou": "medvision.models.matcher:by_iou",
}
# The same of the first of two stages, with the settings of its proposals.
PROPOSAL_MATCHERS = {
    "atss": "medvision.models.proposal_training:by_atss",
    "iou": "medvision.models.proposal_training:by_iou",
}
# each a medvision.models.proposal_training.ObjectnessLoss
PROPOSAL_LOSSES = {
    "focal": "medvision.models.proposal_training:FOCAL",
    "sampled": "medvision.models.proposal_training:SAMPLED",
}
# channels, bins along a side, width, classes -> medvision.models.region_heads.RegionHead
REGION_HEADS = {
    "linear": "medvision.models.region_heads:LinearHead",
    "convolutions": "medvision.models.region_heads:ConvolutionHead",
}
# each a medvision.models.region_training.RegionLoss
REGION_LOSSES = {
    "cross-entropy": "medvision.models.region_training:CROSS_ENTROPY",
    "focal": "medvision.models.region_training:FOCAL",
}


@dataclass(frozen=True)
class OneOf:
    """Marks a setting whose value is a name in ``choices``: ``Annotated[str, OneOf(LESION_LOSSES)]``."""

    choices: Mapping[str, str]

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Check, describe and refuse as a Literal of the names would."""
        return core_schema.literal_schema(list(self.choices))

    def __hash__(self) -> int:
        """Hash by the names: pydantic keeps what it built."""
        return hash(tuple(self.choices))


def find_choice(choices: Mapping[str, str], name: str) -> Any:
    """Return what ``name`` stands for in one of the tables above; it is imported only now."""
    module, _, attribute = choices[name].partition(":")
    return getattr(import_module(module), attribute)
