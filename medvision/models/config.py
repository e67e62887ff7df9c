"""Settings of the detector; read without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from medvision.models.choices import BOX_LOSSES, HEADS, LESION_LOSSES, MATCHERS, OneOf
from medvision.models.pyramid_config import PyramidConfig

HeadName = Annotated[str, OneOf(HEADS)]
LesionLoss = Annotated[str, OneOf(LESION_LOSSES)]
BoxLoss = Annotated[str, OneOf(BOX_LOSSES)]
MatcherName = Annotated[str, OneOf(MATCHERS)]


class RetinaNetConfig(PyramidConfig):
    """The network: a backbone, a feature pyramid and one head on all its levels."""

    name: Literal["retinanet"] = "retinanet"
    head: HeadName = Field(
        "separate",
        description="convolutions before the outputs: separate for the class and the box, or shared",
    )
    head_depth: int = Field(2, ge=1, description="3 x 3 convolutions before each output")
    lesion_loss: LesionLoss = Field("focal", description="loss of the lesion score, on all anchors")
    focal_alpha: float = Field(0.25, gt=0, lt=1, description="weight of lesions in the focal loss")
    focal_gamma: float = Field(2.0, ge=0, description="how much easy examples are played down")
    balanced_alpha: float = Field(
        0.75, gt=0, lt=1, description="weight of lesions in the balanced cross-entropy"
    )
    negatives_per_positive: int = Field(
        3,
        ge=1,
        description="background anchors that hard-negative mining keeps for each positive one",
    )
    varifocal_alpha: float = Field(
        0.75, gt=0, description="weight of the background in the varifocal loss"
    )
    varifocal_gamma: float = Field(
        2.0, ge=0, description="how much easy background is played down in the varifocal loss"
    )
    box_loss: BoxLoss = Field("giou", description="loss of the boxes, on positive anchors")
    smooth_l1_beta: float = Field(
        0.11, gt=0, description="error of a box delta under which smooth L1 is a square"
    )
    box_weight: float = Field(1.0, ge=0, description="weight of the box loss")
    class_weight: float = Field(0.5, ge=0, description="weight of the class loss")
    matcher: MatcherName = Field("atss", description="which anchors are positive for a lesion")
    atss_candidates: int = Field(
        9,
        ge=1,
        description="anchors a level that ATSS looks at per box, all shapes together (the authors' code "
        "takes so many of each shape)",
    )
    fg_iou_thresh: float = Field(
        0.5, gt=0, le=1, description="IoU matcher: lowest IoU of a positive anchor"
    )
    bg_iou_thresh: float = Field(
        0.4,
        ge=0,
        le=1,
        description="IoU matcher: background below; ignored from here to fg_iou_thresh",
    )
    low_quality_matches: bool = Field(
        True, description="IoU matcher: each lesion's best anchor is positive whatever its IoU"
    )

    @model_validator(mode="after")
    def _thresholds_rise(self) -> RetinaNetConfig:
        if self.bg_iou_thresh > self.fg_iou_thresh:
            raise ValueError(
                f"bg_iou_thresh must be at most fg_iou_thresh, {self.fg_iou_thresh}; "
                f"got {self.bg_iou_thresh}"
            )
        return self
