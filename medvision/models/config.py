"""Settings of the detector; read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

STEM_STRIDE = 2
FINEST_STRIDE = 4
"""Stride of the finest pyramid level, P2; no stage before it enters the pyramid."""

PyramidPaths = Literal["full", "top-down-only", "lateral-only", "finest-only"]
LesionLoss = Literal["focal", "balanced-cross-entropy", "hard-negative-mining", "varifocal"]
BoxLoss = Literal["giou", "diou", "smooth-l1"]
MatcherName = Literal["atss", "iou"]


class RetinaNetConfig(BaseModel):
    """The network: a ResNet, a feature pyramid and one head on all its levels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["retinanet", "retina-unet"] = "retinanet"
    blocks: tuple[int, int, int, int] = Field((2, 2, 2, 2), description="blocks a stage; ResNet-18")
    width: int = Field(
        32, ge=8, description="channels of the first stage; doubled at each next one"
    )
    stem_pooling: bool = Field(
        False, description="the max pooling after the stem; off keeps P2 sharp"
    )
    inner_windows: tuple[tuple[float, float], ...] = Field(
        ((0.0, 0.5),), description="further windows, in shares of the stack's; none: ()"
    )
    pyramid_channels: int = Field(64, ge=8, description="channels of every pyramid level")
    pyramid: PyramidPaths = Field(
        "full",
        description="paths of the pyramid; the others are ablations. finest-only leaves one level: give it "
        "the anchors of all",
    )
    head_depth: int = Field(2, ge=1, description="3 x 3 convolutions before each output")
    anchors_per_level: int = Field(2, ge=1, description="anchor shapes at each position of a level")
    anchor_sizes: tuple[tuple[tuple[float, float], ...], ...] = Field(
        (), description="width, height in pixels of each level's anchors; none: fitted to the data"
    )
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
    atss_candidates: int = Field(9, ge=1, description="anchors a level that ATSS looks at per box")
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

    @property
    def strides(self) -> list[int]:
        """Strides of the pyramid levels, finest first, in pixels."""
        first = STEM_STRIDE * (2 if self.stem_pooling else 1)
        used = [first << index for index in range(4) if first << index >= FINEST_STRIDE]
        return used[:1] if self.pyramid == "finest-only" else used

    @model_validator(mode="after")
    def _consistent(self) -> RetinaNetConfig:
        for low, high in self.inner_windows:
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"each of inner_windows must be low, high with 0 <= low < high <= 1; got {low}, {high}"
                )
        if self.bg_iou_thresh > self.fg_iou_thresh:
            raise ValueError(
                f"bg_iou_thresh must be at most fg_iou_thresh, {self.fg_iou_thresh}; "
                f"got {self.bg_iou_thresh}"
            )
        if self.anchor_sizes:
            self._check_anchor_sizes()
        return self

    def _check_anchor_sizes(self) -> None:
        levels, shapes = len(self.strides), self.anchors_per_level
        given = [len(level) for level in self.anchor_sizes]
        if given != [shapes] * levels:
            raise ValueError(
                f"anchor_sizes must hold {shapes} (anchors_per_level) sizes for each of {levels} pyramid "
                f"levels; got {given}"
            )
        if any(side <= 0 for level in self.anchor_sizes for size in level for side in size):
            raise ValueError("anchor_sizes must be above 0 pixels")
