"""Settings of the U-Net and of segmentation losses, and their record in weights; read without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medvision.errors import InputError
from medvision.models.choices import BACKBONES, SEGMENTATION_LOSSES
from medvision.models.pyramid_config import Norm, StageConvolution

OWN_ENCODER = "unet"
"""Name of the paper's encoder; every other name is one of medvision.models.choices.BACKBONES, or timm/NAME."""

ARCHITECTURE = "architecture"
"""Name in a state dict of the settings that the weights were made with: JSON, a byte an element."""

_CUT = 4
"""Pixels of a side that two 3 x 3 convolutions without padding cost."""


class SegmentationLossConfig(BaseModel):
    """The sum of losses that a segmentation is trained with; a weight of 0 leaves one out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dice: float = Field(1.0, ge=0, description="weight of the Dice loss")
    cross_entropy: float = Field(1.0, ge=0, description="weight of the cross-entropy")
    focal: float = Field(0.0, ge=0, description="weight of the focal loss")
    tversky: float = Field(0.0, ge=0, description="weight of the Tversky loss")
    focal_tversky: float = Field(0.0, ge=0, description="weight of the focal Tversky loss")
    focal_gamma: float = Field(2.0, ge=0, description="how much easy pixels are played down")
    tversky_alpha: float = Field(0.3, ge=0, description="cost of a false positive pixel (Tversky)")
    tversky_beta: float = Field(0.7, ge=0, description="cost of a missed pixel (Tversky)")
    focal_tversky_power: float = Field(
        0.75, gt=0, le=1, description="power of the focal Tversky loss; below 1: hard lesions count"
    )
    background_weight: float = Field(
        1.0, ge=0, description="weight of background pixels in cross-entropy and focal loss"
    )
    border_weight: float = Field(
        0.0, ge=0, description="added weight of background between close lesions; paper: 10"
    )
    border_sigma: float = Field(
        5.0, gt=0, description="how far lesions are close, in pixels (border_weight)"
    )

    @property
    def weights(self) -> dict[str, float]:
        """The losses in use and their weights."""
        weights = {name: float(getattr(self, name)) for name in SEGMENTATION_LOSSES}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @model_validator(mode="after")
    def _some_loss(self) -> SegmentationLossConfig:
        if not self.weights:
            raise ValueError("one of the segmentation losses must have a weight above 0")
        return self


class UNetLossConfig(SegmentationLossConfig):
    """The losses of a U-Net."""

    # Lesions are a pixel in a thousand: at the weight of all, the first 200 steps only learn to say background.
    background_weight: float = Field(
        0.05, ge=0, description="weight of background pixels in cross-entropy and focal loss"
    )


class UNetConfig(BaseModel):
    """The network: an encoder, a decoder that doubles the resolution step by step, and skips."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["unet"] = "unet"
    encoder: str = Field(
        OWN_ENCODER,
        min_length=1,
        description=f"unet: the paper's; or {', '.join(BACKBONES)}, or timm/NAME (package timm)",
    )
    encoder_norm: Norm = Field(
        "batch", description="norms of a named encoder; frozen and group suit small batches"
    )
    encoder_convolution: StageConvolution = Field(
        "plain",
        description="3 x 3 convolutions of the last three stages of a named encoder (ResNets only)",
    )
    depth: int = Field(
        4,
        ge=1,
        le=7,
        description="down-samplings; the coarsest map has stride 2^depth",
    )
    base_channels: int = Field(
        16,
        ge=1,
        description="channels at full resolution, doubled at every down-sampling; paper: 64",
    )
    norm: Literal["batch", "instance", "group", "none"] = Field(
        "batch",
        description="after every 3 x 3 convolution but those of a named encoder; paper: none",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the coarsest map's channels hidden"
    )
    upsampling: Literal["transposed", "bilinear", "nearest"] = Field(
        "transposed", description="transposed 2 x 2 convolution, or interpolation and 1 x 1"
    )
    padding: Literal["same", "valid"] = Field(
        "same",
        description="same: output as large as the input; valid: the paper's 572 -> 388, for the "
        "network by itself: medvision train refuses it",
    )
    pooling: Literal["max", "average", "stride"] = Field(
        "max", description="how the encoder halves; stride: a 2 x 2 convolution"
    )
    deep_supervision: tuple[float, ...] = Field(
        (), description="loss weights of the coarser decoder maps, finest first; none: []"
    )
    inner_windows: tuple[tuple[float, float], ...] = Field(
        ((0.0, 0.5),), description="further windows, in shares of the stack's; none: []"
    )
    loss: UNetLossConfig = UNetLossConfig()

    @property
    def strides(self) -> list[int]:
        """Strides of the resolutions, finest first, in pixels: 1, 2, ... 2^depth."""
        return [1 << index for index in range(self.depth + 1)]

    @property
    def architecture(self) -> dict[str, object]:
        """What weights depend on, kept beside them; losses and their weights are not among it."""
        kept = self.model_dump(mode="json", exclude={"name", "loss", "deep_supervision"})
        return {**kept, "deep_supervision": len(self.deep_supervision)}

    @model_validator(mode="after")
    def _consistent(self) -> UNetConfig:
        for low, high in self.inner_windows:
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"each of inner_windows must be low, high with 0 <= low < high <= 1; got {low}, {high}"
                )
        if self.padding == "valid" and self.encoder != OWN_ENCODER:
            raise ValueError(f"padding valid needs encoder {OWN_ENCODER}; got {self.encoder}")
        if self.pooling != "max" and self.encoder != OWN_ENCODER:
            raise ValueError(
                f"pooling can be set for encoder {OWN_ENCODER} only; {self.encoder} has its own"
            )
        self._check_encoder()
        if len(self.deep_supervision) >= self.depth:
            raise ValueError(
                f"deep_supervision must hold fewer weights than depth ({self.depth}); "
                f"got {len(self.deep_supervision)}"
            )
        if any(weight <= 0 for weight in self.deep_supervision):
            raise ValueError("deep_supervision weights must be above 0")
        return self

    def _check_encoder(self) -> None:
        changed = [
            name
            for name in ("encoder_norm", "encoder_convolution")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.encoder == OWN_ENCODER and changed:
            raise ValueError(f"{' and '.join(changed)} can be set for a named encoder only")
        if self.encoder.startswith("timm/") and self.encoder_convolution != "plain":
            raise ValueError("encoder_convolution must be plain for a timm model")


def valid_output_size(size: int, depth: int) -> int:
    """Return the output's side for an input's side without padding: 572 -> 388 at depth 4.

    Every pooled map must have an even side (Ronneberger et al. 2015, section 2). Raises InputError for
    sizes where that fails or nothing is left, with the next one that fits.
    """
    coarsest = _coarsest_side(size, depth)
    output = _decoded_side(coarsest, depth) if coarsest is not None else None
    if output is None:
        raise InputError(
            f"A U-Net of depth {depth} without padding takes no side of {size} pixels.",
            why="Every map that is halved must have an even side, and some output must be left.",
            do=f"Give {fitting_input_size(size, depth)} pixels, or set padding to same.",
        )
    return output


def fitting_input_size(size: int, depth: int) -> int:
    """Return the smallest side of ``size`` or more that :func:`valid_output_size` takes."""
    while True:
        coarsest = _coarsest_side(size, depth)
        if coarsest is not None and _decoded_side(coarsest, depth) is not None:
            return size
        size += 1


def _coarsest_side(size: int, depth: int) -> int | None:
    for _ in range(depth):
        size -= _CUT
        if size <= 0 or size % 2:
            return None
        size //= 2
    return size - _CUT


def _decoded_side(size: int, depth: int) -> int | None:
    for _ in range(depth):
        if size <= 0:
            return None
        size = 2 * size - _CUT
    return size if size > 0 else None


def record_architecture(config: UNetConfig, n_slices: int, classes: int) -> bytes:
    """Return what weights depend on as JSON, to be kept among them.

    Dropout, pooling, padding and interpolation leave no trace in the weights' shapes, yet weights
    trained with one are wrong with another.
    """
    values = {**config.architecture, "n_slices": n_slices, "classes": classes}
    return json.dumps(values, sort_keys=True).encode("ascii")


def check_architecture(found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise InputError that names the settings in which two records differ."""
    wanted = json.loads(bytes(expected))
    try:
        there = dict(json.loads(bytes(found)))
    except (ValueError, TypeError) as error:
        raise InputError("The record of settings in the weights is damaged.") from error
    for name in sorted({*wanted, *there}):
        if wanted.get(name) != there.get(name):
            raise InputError(
                f"The weights are of a U-Net with {name} {_shown(there.get(name))}; "
                f"the configuration says {_shown(wanted.get(name))}.",
                do="Keep the weights and the configuration of one run together.",
            )


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
