"""Settings of the detector; read without torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

STEM_STRIDE = 2
FINEST_STRIDE = 4
"""Stride of the finest pyramid level, P2; no stage before it enters the pyramid."""


class RetinaNetConfig(BaseModel):
    """The network: a ResNet, a feature pyramid and one head on all its levels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    head_depth: int = Field(2, ge=1, description="3 x 3 convolutions before each output")
    anchors_per_level: int = Field(2, ge=1, description="anchor shapes at each position of a level")
    anchor_sizes: tuple[tuple[tuple[float, float], ...], ...] = Field(
        (), description="width, height in pixels of each level's anchors; none: fitted to the data"
    )
    focal_alpha: float = Field(0.25, gt=0, lt=1, description="weight of lesions in the focal loss")
    focal_gamma: float = Field(2.0, ge=0, description="how much easy examples are played down")
    box_weight: float = Field(1.0, ge=0, description="weight of the box loss (GIoU)")
    class_weight: float = Field(0.5, ge=0, description="weight of the class loss")
    atss_candidates: int = Field(9, ge=1, description="anchors a level that ATSS looks at per box")

    @property
    def strides(self) -> list[int]:
        """Strides of the pyramid levels, finest first, in pixels."""
        first = STEM_STRIDE * (2 if self.stem_pooling else 1)
        return [first << index for index in range(4) if first << index >= FINEST_STRIDE]

    @model_validator(mode="after")
    def _consistent(self) -> RetinaNetConfig:
        for low, high in self.inner_windows:
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"each of inner_windows must be low, high with 0 <= low < high <= 1; got {low}, {high}"
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
