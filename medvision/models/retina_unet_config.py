"""Settings of Retina U-Net; read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medvision.models.config import RetinaNetConfig
from medvision.models.unet_config import SegmentationLossConfig


class RetinaUNetLossConfig(SegmentationLossConfig):
    """The losses of a Retina U-Net's segmentation, where there are masks."""

    dice: float = Field(0.5, ge=0, description="weight of the Dice loss")
    cross_entropy: float = Field(0.5, ge=0, description="weight of the cross-entropy")


class RetinaUNetConfig(RetinaNetConfig):
    """The RetinaNet's settings, and those of the segmentation branch at the top of its pyramid."""

    # Not the parent's name besides its own: the settings' JSON Schema must know the two apart.
    name: Literal["retina-unet"] = "retina-unet"  # type: ignore[assignment]
    segmentation_stride: Literal[1, 2] = Field(
        2, description="stride of the finest segmentation map; it is enlarged to the image's size"
    )
    segmentation_channels: int = Field(
        32, ge=8, description="channels of the segmentation branch, at strides 2 and 1"
    )
    segmentation_loss: RetinaUNetLossConfig = RetinaUNetLossConfig()
