"""SampleConfig: the numbers that the sample is made with, read from sample_data/sample.yaml."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, model_validator

from medvision.errors import InputError

RECIPE = 3
"""Number of the way samples are made; raised by every change of code that changes a voxel."""


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"a range must be [low, high]; got {list(pair)}")
    return pair


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WheelConfig(_Part):
    """One file on PyPI, named so exactly that no other can stand in for it."""

    distribution: str
    version: str
    file_name: str
    sha256: str


class TrainConfig(_Part):
    """The sub-volumes to train on: of the right lung, and healthy ones from elsewhere in the body."""

    scans: PositiveInt
    healthy_scans: int = Field(ge=0)
    elsewhere_scans: int = Field(ge=0)
    nodule_counts: dict[PositiveInt, Fraction]
    decoys: tuple[int, int]
    size: tuple[int, int, int]
    min_lung_fraction: Fraction
    min_body_fraction: Fraction

    @model_validator(mode="after")
    def _counts_fit(self) -> TrainConfig:
        if not self.elsewhere_scans <= self.healthy_scans <= self.scans:
            raise ValueError(
                "elsewhere_scans must be at most healthy_scans, and these at most scans; got "
                f"{self.elsewhere_scans}, {self.healthy_scans}, {self.scans}"
            )
        return self


class TestConfig(_Part):
    """The whole left lungs to test on."""

    __test__ = False

    scans: PositiveInt
    nodule_counts: dict[int, Fraction]
    decoys: tuple[int, int]
    margin: tuple[int, int, int]


class PlacementConfig(_Part):
    """Where a lesion or a decoy may lie."""

    gap_mm: float
    min_inside: Fraction
    max_mean_hu: float
    vessel_hu: float
    max_vessel_fraction: Fraction
    attempts: PositiveInt


class DensityConfig(_Part):
    """What a lesion is made of, in HU."""

    psf_sigma_px: float
    solid_hu: Range
    ground_glass_hu: Range
    core_fraction: Range
    solid_texture_hu: float
    ground_glass_texture: float


class DecoyConfig(_Part):
    """The look-alikes that nobody labels."""

    weights: dict[Literal["vessel", "scar", "calcified", "patch"], Fraction]
    vessel_diameter_mm: Range
    vessel_length_mm: Range
    vessel_hu: Range
    branch_probability: Fraction
    scar_thickness_mm: Range
    scar_length_mm: Range
    scar_hu: Range
    calcified_diameter_mm: Range
    calcified_hu: Range


class SampleConfig(_Part):
    """All that decides the bytes of a sample; two equal configurations make equal samples."""

    seed: int = Field(ge=0)
    ct_wheel: WheelConfig
    outlines_wheel: WheelConfig
    ct_patient_id: str
    right_lung_labels: tuple[int, ...]
    left_lung_labels: tuple[int, ...]
    min_readers: PositiveInt
    diameter_mm: Range
    train: TrainConfig
    test: TestConfig
    placement: PlacementConfig
    density: DensityConfig
    decoys: DecoyConfig

    def digest(self) -> str:
        """Return a SHA-256 that changes with any setting and with the recipe."""
        return hashlib.sha256(f"{RECIPE}|{self.model_dump_json()}".encode()).hexdigest()


def load_config(seed: int | None = None) -> SampleConfig:
    """Read the installed sample.yaml; ``seed`` replaces the one written there.

    Raises InputError if the file breaks a rule of SampleConfig.
    """
    import yaml

    source = resources.files("medvision.sample_data") / "sample.yaml"
    values = yaml.safe_load(source.read_text(encoding="utf-8"))
    if seed is not None:
        values["seed"] = seed
    try:
        return SampleConfig.model_validate(values)
    except ValueError as error:
        raise InputError(
            "The sample's configuration breaks a rule.", where=source, why=str(error)
        ) from error
