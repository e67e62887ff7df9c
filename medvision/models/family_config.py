"""The settings of any model of the family, known by its name; read without torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Discriminator, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

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


@dataclass(frozen=True)
class _ByName:
    """Marks the union of all models: what pydantic makes of a function that chooses is mended here."""

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Look at the name first: pydantic's refusal speaks of tags, and knows no nearest name."""
        return core_schema.no_info_before_validator_function(_check_name, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Say by the name which model's schema counts.

        Pydantic lists the models and wants one alone to fit, yet settings that leave out the name, and are
        RetinaNet's, fit several.
        """
        models = zip(MODEL_CONFIGS, handler(schema)["oneOf"], strict=True)
        return {
            "type": "object",
            "properties": {"name": {"enum": list(MODEL_CONFIGS), "default": DEFAULT_MODEL}},
            "allOf": [{"if": _named(name), "then": its_schema} for name, its_schema in models],
        }


def _named(name: str) -> JsonSchemaValue:
    """Return the JSON Schema of all tables that :func:`model_name` gives this name."""
    required = {} if name == DEFAULT_MODEL else {"required": ["name"]}
    return {"properties": {"name": {"const": name}}, **required}


def _check_name(value: Any) -> Any:
    """Return a model's settings as they are; pydantic's errors if they name none of the models."""
    if not isinstance(value, dict | BaseModel):
        raise PydanticCustomError("model_table", "it must be a table, such as {name: unet}")
    name = value.get("name", DEFAULT_MODEL) if isinstance(value, dict) else model_name(value)
    if name in list(MODEL_CONFIGS):  # a list, because what a file has here may be unhashable
        return value
    close = difflib.get_close_matches(str(name).lower(), MODEL_CONFIGS, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"unknown model {name!r}{meant} ({', '.join(MODEL_CONFIGS)})")


ModelConfig = Annotated[
    Annotated[RetinaNetConfig, Tag("retinanet")]
    | Annotated[FasterRCNNConfig, Tag("faster-rcnn")]
    | Annotated[MaskRCNNConfig, Tag("mask-rcnn")]
    | Annotated[RetinaUNetConfig, Tag("retina-unet")]
    | Annotated[UNetConfig, Tag("unet")],
    Discriminator(model_name),
    _ByName(),
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


def has_frozen_norm(model: ModelConfig) -> bool:
    """Tell whether the backbone's norms stay as they are, with the statistics of its weights."""
    return (model.encoder_norm if isinstance(model, UNetConfig) else model.norm) == "frozen"
