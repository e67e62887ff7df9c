"""Settings that all detectors on a pyramid have in common: backbone, pyramid, anchors; read without torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medvision.models.choices import BACKBONES, NARROW

STEM_STRIDE = 2
FINEST_STRIDE = 4
"""Stride of the finest pyramid level, P2; no stage before it enters the pyramid."""

Norm = Literal["batch", "frozen", "group"]
"""batch: as built; frozen: batch norm with fixed statistics and weights; group: group norm."""

StageConvolution = Literal["plain", "deformable", "deformable-v1", "dilated"]
Blocks = Annotated[int, Field(ge=1)]
PyramidPaths = Literal["full", "top-down-only", "lateral-only", "finest-only"]


class PyramidConfig(BaseModel):
    """From the slices to the levels of the pyramid, and the anchors on them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str = Field(
        NARROW,
        min_length=1,
        description=f"{', '.join(BACKBONES)}, or timm/NAME (package timm)",
    )
    blocks: tuple[Blocks, Blocks, Blocks, Blocks] = Field(
        (2, 2, 2, 2), description=f"blocks a stage of {NARROW}"
    )
    width: int = Field(
        32, ge=8, description=f"channels of {NARROW}'s first stage; doubled at each next one"
    )
    stem_pooling: bool = Field(
        False, description="the max pooling after the stem; off keeps P2 sharp (ResNets only)"
    )
    norm: Norm = Field(
        "batch", description="norms of the backbone; frozen and group suit small batches"
    )
    stage_convolution: StageConvolution = Field(
        "plain", description="3 x 3 convolutions of the last three stages (ResNets only)"
    )
    inner_windows: tuple[tuple[float, float], ...] = Field(
        ((0.0, 0.5),), description="further windows, in shares of the stack's; none: []"
    )
    pyramid_channels: int = Field(64, ge=8, description="channels of every pyramid level")
    pyramid: PyramidPaths = Field(
        "full",
        description="paths of the pyramid; the others are ablations. finest-only leaves one level: give it "
        "the anchors of all",
    )
    anchors_per_level: int = Field(2, ge=1, description="anchor shapes at each position of a level")
    anchor_sizes: tuple[tuple[tuple[float, float], ...], ...] = Field(
        (), description="width, height in pixels of each level's anchors; none: fitted to the data"
    )

    @property
    def strides(self) -> list[int]:
        """Strides of the pyramid levels, finest first, in pixels."""
        first = STEM_STRIDE * (2 if self.stem_pooling else 1)
        used = [first << index for index in range(4) if first << index >= FINEST_STRIDE]
        return used[:1] if self.pyramid == "finest-only" else used

    @model_validator(mode="after")
    def _pyramid_is_consistent(self) -> Self:
        for low, high in self.inner_windows:
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"each of inner_windows must be low, high with 0 <= low < high <= 1; got {low}, {high}"
                )
        if self.anchor_sizes:
            self._check_anchor_sizes()
        self._check_backbone()
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

    def _check_backbone(self) -> None:
        own = {"blocks", "width"} & self.model_fields_set
        changed = sorted(name for name in own if getattr(self, name) != _default(name))
        if self.backbone != NARROW and changed:
            raise ValueError(f"{' and '.join(changed)} can be set for {NARROW} only")
        if self.backbone.startswith("timm/") and self.stage_convolution != "plain":
            raise ValueError("stage_convolution must be plain for a timm model")
        if self.backbone.startswith("timm/") and not self.stem_pooling:
            raise ValueError("stem_pooling must be true for a timm model: its strides are its own")


def _default(name: str) -> object:
    return PyramidConfig.model_fields[name].default
