"""The settings of any model of the family, known by its name; read without torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, Tag

from medvision.models.config import RetinaNetConfig
from medvision.models.retina_unet_config import RetinaUNetConfig
from medvision.models.two_stage_config import FasterRCNNConfig, MaskRCNNConfig
from medvision.models.unet_config import OWN_ENCODER, UNetConfig

DEFAULT_MODEL = "retinanet"

MODEL_CONFIGS: dict[str, type[BaseModel]] = {
    "retinanet": RetinaNetConfig,
    "faster-rcnn": FasterRCNNConfig,
    "mask-rcnn": MaskRCNNConfig,
    "retina-unet": RetinaUNetConfig,
    "unet": UNetConfig,
}
"""Every model's settings, by the name that ``--model`` takes."""


def model_name(value: Any) -> str:
    """Return the name of a model in its settings, as an object or as a table; retinanet if none is given."""
    name = value.get("name", DEFAULT_MODEL) if isinstance(value, dict) else None
    return str(name or getattr(value, "name", value))


ModelConfig = Annotated[
    Annotated[RetinaNetConfig, Tag("retinanet")]
    | Annotated[FasterRCNNConfig, Tag("faster-rcnn")]
    | Annotated[MaskRCNNConfig, Tag("mask-rcnn")]
    | Annotated[RetinaUNetConfig, Tag("retina-unet")]
    | Annotated[UNetConfig, Tag("unet")],
    Discriminator(model_name),
]


def backbone_name(model: ModelConfig) -> str | None:
    """Return the name of a model's backbone; None for the U-Net's own encoder."""
    if isinstance(model, UNetConfig):
        return None if model.encoder == OWN_ENCODER else model.encoder
    return model.backbone


def must_learn(model: ModelConfig) -> bool:
    """Tell whether the backbone differs from the one that published weights were trained in."""
    if isinstance(model, UNetConfig):
        return model.encoder_norm == "group" or model.encoder_convolution != "plain"
    return model.norm == "group" or model.stage_convolution != "plain"
