"""Settings of a training run; read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from medvision.errors import UsageError
from medvision.findings.config import PredictConfig
from medvision.models.config import RetinaNetConfig
from medvision.models.family_config import ModelConfig, backbone_name, has_frozen_norm, must_learn
from medvision.models.unet_config import UNetConfig
from medvision.stacks.augment import AugmentConfig
from medvision.stacks.config import StackConfig
from medvision.training.settings_help import dotted_name, unknown_in_file
from medvision.training.transfer import Transfer

CONFIG_FILE = "config.json"
"""Name in a run folder of the settings that it was started with."""


class SamplingConfig(BaseModel):
    """Which crops a network sees in training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    crop_size: int = Field(96, ge=32, le=2048, multiple_of=16, description="side of a crop, pixels")
    lesion_share: float = Field(0.3, ge=0, le=1, description="share of crops centred near a lesion")
    hard_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of crops on false positives, in the second half of a run",
    )
    class_balance: float = Field(
        0.7, ge=0, le=1, description="0: lesions as often as they are; 1: classes equally often"
    )
    paste_share: float = Field(
        0.7, ge=0, le=1, description="share of crops into which a lesion of some scan is pasted"
    )
    paste_zoom: tuple[float, float] = Field(
        (0.6, 2.0), description="smallest and largest zoom of a pasted lesion against its own size"
    )
    ignore_slices: int = Field(
        1,
        ge=0,
        description="slices above and below a lesion where it is neither lesion nor background",
    )
    least_visible: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a lesion that must be in the crop to count; else ignored",
    )

    @field_validator("paste_zoom")
    @classmethod
    def _rising(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.1 <= value[0] <= value[1] <= 10:
            raise ValueError("paste_zoom must be low, high with 0.1 <= low <= high <= 10")
        return value


class TrainConfig(BaseModel):
    """A training run. Dotted names reach the parts, as in ``sampling.crop_size``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(2200, ge=1, description="batches to train on")
    max_minutes: float = Field(
        14.25, ge=0, description="finish in this time even if steps are left; 0: no limit"
    )
    batch_size: int = Field(24, ge=1, description="crops in a batch")
    learning_rate: float = Field(2e-3, gt=0, description="highest rate, AdamW")
    weight_decay: float = Field(0.02, ge=0, description="AdamW")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the run with rising rate")
    gradient_clip: float = Field(5.0, gt=0, description="largest norm of the gradient")
    average_share: float = Field(
        0.33,
        ge=0,
        le=1,
        description="share of the steps so far over which the weights that are kept are averaged",
    )
    class_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="weight of each class in the loss, 1 for one not named; if none is named, by the "
        "inverse root of the number of lesions. Not in Retina U-Net's segmentation",
    )
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="share of patients held out")
    validations: int = Field(2, ge=1, description="times the held-out scans are looked at")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything that is drawn")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    workers: int = Field(0, ge=0, description="processes that prepare crops; 0: the main one")
    weights: str | None = Field(
        None,
        min_length=1,
        description="pretrained weights of the backbone: imagenet, another published name, or a file",
    )
    transfer: Transfer = Field(
        "auto",
        description="what of pretrained weights learns: probe, frozen, finetune, scratch, or auto",
    )
    stack: StackConfig = StackConfig()
    sampling: SamplingConfig = SamplingConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = RetinaNetConfig()
    predict: PredictConfig = Field(PredictConfig(), validate_default=True)

    @field_validator("predict")
    @classmethod
    def _a_unet_looks_once(cls, value: PredictConfig, info: ValidationInfo) -> PredictConfig:
        if not isinstance(info.data.get("model"), UNetConfig):
            return value
        if "scales" in value.model_fields_set and value.scales != (1.0,):
            raise ValueError("predict.scales fuses boxes; a U-Net draws none: leave it at [1.0]")
        return value.model_copy(update={"scales": (1.0,)})

    @model_validator(mode="after")
    def _crops_fit_the_pyramid(self) -> TrainConfig:
        coarsest = self.model.strides[-1]
        if self.sampling.crop_size % coarsest:
            raise ValueError(
                f"sampling.crop_size must be a multiple of {coarsest}, the coarsest stride of the model; "
                f"got {self.sampling.crop_size}"
            )
        return self

    @model_validator(mode="after")
    def _crops_fit_the_unet(self) -> TrainConfig:
        if isinstance(self.model, UNetConfig) and self.model.padding == "valid":
            raise ValueError(
                "model.padding must be same for training and prediction, where the output covers the "
                "input; valid is the paper's, for use of the network by itself"
            )
        return self

    @model_validator(mode="after")
    def _weights_fit_the_transfer(self) -> TrainConfig:
        if self.weights is None and self.transfer not in ("auto", "scratch"):
            raise ValueError(
                f"transfer {self.transfer} needs pretrained weights: set weights to imagenet or a file"
            )
        if self.weights is not None and self.transfer == "scratch":
            raise ValueError(
                "transfer scratch starts from nothing: leave out weights, or the transfer"
            )
        if self.transfer in ("frozen", "probe") and must_learn(self.model):
            raise ValueError(
                f"transfer {self.transfer} leaves the backbone as it is, but group norm and "
                "convolutions other than plain change it, so that it must learn: set transfer to "
                "finetune"
            )
        if self.weights is None and has_frozen_norm(self.model):
            raise ValueError(
                "frozen norms keep the statistics of pretrained weights, and there are none: set weights "
                "to imagenet or a file, or the norms to batch or group"
            )
        if self.weights is not None and backbone_name(self.model) is None:
            raise ValueError(
                "weights need a named backbone: set model.encoder to one, such as resnet18"
            )
        return self


def read_settings(path: Path) -> dict[str, Any]:
    """Return the nested table in a YAML or JSON file, unchecked; UsageError if there is none."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            "The configuration must be a readable YAML file.", where=path, why=str(error)
        ) from error
    if not isinstance(values, dict):
        raise UsageError("The configuration must be a table of names and values.", where=path)
    return values


def make_train_config(values: dict[str, Any], where: str) -> TrainConfig:
    """Check a nested table of settings; UsageError names the first that is wrong and what it takes.

    A name that no setting has is told before any wrong value, with the nearest known name.
    """
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        unknown_first = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        what, remedy = _refusal(unknown_first[0])
        raise UsageError(what, where=where, do=remedy) from error


def _refusal(error: Any) -> tuple[str, str | None]:
    """Return a sentence on one of pydantic's errors, and what to do about it if that is known."""
    if error["type"] == "extra_forbidden":
        key, remedy = unknown_in_file(error["loc"], TrainConfig)
        return f"There is no setting {key!r}.", remedy
    name = dotted_name(error["loc"], TrainConfig)
    if error["type"] == "value_error" and isinstance(error.get("input"), dict):
        # A check of several settings together: its sentence names them; all of them would be too much.
        of = f" in {name!r}" if name else ""
        return f"The settings{of} are refused: {error['ctx']['error']}.", None
    return f"Setting {name!r} is refused: {error['msg']}; got {error.get('input')!r}.", None
