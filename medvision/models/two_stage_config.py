"""Settings of the two-stage detectors, Faster R-CNN and Mask R-CNN; read without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medvision.models.choices import (
    PROPOSAL_LOSSES,
    PROPOSAL_MATCHERS,
    REGION_HEADS,
    REGION_LOSSES,
    OneOf,
)
from medvision.models.pyramid_config import PyramidConfig


def _check_order(background_iou: float, foreground_iou: float) -> None:
    if background_iou > foreground_iou:
        raise ValueError(
            "background_iou must not be above foreground_iou; "
            f"got {background_iou} and {foreground_iou}"
        )


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ProposalConfig(_Part):
    """The first stage: which anchors are worth a second look."""

    depth: int = Field(1, ge=1, description="3 x 3 convolutions before the outputs")
    matcher: Annotated[str, OneOf(PROPOSAL_MATCHERS)] = Field(
        "atss", description="which anchors stand for a lesion; iou: thresholds, as in the paper"
    )
    atss_candidates: int = Field(
        9,
        ge=1,
        description="anchors a level that ATSS looks at per box, all shapes together (the authors' code "
        "takes so many of each shape)",
    )
    foreground_iou: float = Field(0.7, gt=0, le=1, description="IoU of a lesion's anchor (iou)")
    background_iou: float = Field(0.3, ge=0, le=1, description="IoU under which it is none (iou)")
    loss: Annotated[str, OneOf(PROPOSAL_LOSSES)] = Field(
        "focal",
        description="focal: on all anchors; sampled: cross-entropy on some, as in the paper (the box "
        "loss is divided by the lesions' anchors, not as there)",
    )
    focal_alpha: float = Field(0.25, gt=0, lt=1, description="weight of lesions in the focal loss")
    focal_gamma: float = Field(2.0, ge=0, description="how much easy anchors are played down")
    anchors_sampled: int = Field(256, ge=2, description="anchors an image (sampled)")
    positive_share: float = Field(0.5, gt=0, le=1, description="most of them on lesions (sampled)")
    box_weight: float = Field(1.0, ge=0, description="weight of the box loss (smooth L1)")
    pre_nms_top_n: int = Field(300, ge=1, description="anchors a level that go into NMS")
    post_nms_top_n_training: int = Field(200, ge=1, description="proposals a slice, in training")
    post_nms_top_n: int = Field(100, ge=1, description="proposals a slice, in use")
    nms_thresh: float = Field(0.7, ge=0, le=1, description="IoU above which a proposal is a copy")

    @model_validator(mode="after")
    def _ordered(self) -> ProposalConfig:
        _check_order(self.background_iou, self.foreground_iou)
        return self


class LevelRuleConfig(_Part):
    """From which pyramid level a region is pooled; level k has stride 2^k."""

    k0: int | None = Field(
        None, ge=0, description="level of a region of canonical size; none: fitted to the data"
    )
    canonical_size: float | None = Field(
        None, gt=0, description="root of width x height, pixels; none: fitted to the data"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> LevelRuleConfig:
        if (self.k0 is None) != (self.canonical_size is None):
            raise ValueError("k0 and canonical_size must be set together, or neither")
        return self


class RegionConfig(_Part):
    """The second stage: what each proposal is and where exactly."""

    pooling: Literal["align", "deformable"] = Field(
        "align", description="RoIAlign, or deformable RoI pooling, whose bins move"
    )
    pool_size: int = Field(7, ge=1, description="bins along a side of a pooled region")
    sampling_ratio: int = Field(2, ge=1, description="samples along a side of a bin")
    head: Annotated[str, OneOf(REGION_HEADS)] = Field(
        "linear",
        description="what looks at a pooled region: two fully connected layers (linear), or four "
        "convolutions and one such layer",
    )
    width: int = Field(256, ge=8, description="units of a fully connected layer")
    foreground_iou: float = Field(0.5, gt=0, le=1, description="IoU with a lesion to stand for it")
    background_iou: float = Field(
        0.4, ge=0, le=1, description="IoU under which it is background; between: not trained on"
    )
    sampling: Literal["random", "ohem"] = Field(
        "random", description="which regions are trained on; ohem: those with the highest loss"
    )
    regions_sampled: int = Field(64, ge=2, description="regions an image that are trained on")
    positive_share: float = Field(0.25, gt=0, le=1, description="most of them on lesions (random)")
    ohem_nms_thresh: float = Field(
        0.7, ge=0, le=1, description="IoU above which the easier of two regions is left out (ohem)"
    )
    loss: Annotated[str, OneOf(REGION_LOSSES)] = Field(
        "cross-entropy", description="loss over background and classes"
    )
    focal_gamma: float = Field(2.0, ge=0, description="how much easy regions are played down")
    box_weight: float = Field(1.0, ge=0, description="weight of the box loss (smooth L1)")

    @model_validator(mode="after")
    def _ordered(self) -> RegionConfig:
        _check_order(self.background_iou, self.foreground_iou)
        return self


class MaskConfig(_Part):
    """The mask head: four convolutions, then twice the resolution."""

    pool_size: int = Field(14, ge=2, description="bins along a side; masks have twice as many")
    channels: int = Field(64, ge=8, description="channels of its convolutions")
    depth: int = Field(4, ge=1, description="3 x 3 convolutions before the up-sampling")
    per_class: bool = Field(False, description="a mask for each class; off: one for all")
    regions_trained: int = Field(16, ge=1, description="regions an image that it is trained on")
    weight: float = Field(1.0, ge=0, description="weight of the mask loss")
    mask_thresh: float = Field(0.5, gt=0, lt=1, description="probability of a pixel of the mask")


class TwoStageConfig(PyramidConfig):
    """What Faster R-CNN and Mask R-CNN have in common: all but the masks."""

    proposals: ProposalConfig = ProposalConfig()
    level_rule: LevelRuleConfig = LevelRuleConfig()
    regions: RegionConfig = RegionConfig()


class FasterRCNNConfig(TwoStageConfig):
    """Faster R-CNN on a feature pyramid."""

    name: Literal["faster-rcnn"] = "faster-rcnn"


class MaskRCNNConfig(TwoStageConfig):
    """Faster R-CNN with a mask head."""

    name: Literal["mask-rcnn"] = "mask-rcnn"
    mask: MaskConfig = MaskConfig()
