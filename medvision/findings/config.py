"""Settings of prediction: which boxes are kept and how they become findings."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class ComponentsConfig(BaseModel):
    """Which voxels are lesion and which of them are one lesion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float = Field(0.2, gt=0, le=1, description="lowest probability of a lesion's voxel")
    seed_threshold: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability that a lesion reaches somewhere (hysteresis); 0: none",
    )
    peak_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="lowest probability of a lesion's voxel, relative to its highest",
    )
    connectivity: Literal[6, 18, 26] = Field(
        18, description="neighbours of a voxel: by faces, also edges, also corners"
    )
    least_voxels: int = Field(1, ge=1, description="voxels that a lesion has at least")


MIRROR_IMAGES = 4
"""Views of a slice that ``flips`` averages over: as it is, and mirrored along rows, columns and both."""


class PredictConfig(BaseModel):
    """From a slice's boxes to the findings of a scan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(8, ge=1, description="slices the network sees at once")
    box_score_thresh: float = Field(0.02, ge=0, le=1, description="lowest score of a slice's box")
    nms_thresh: float = Field(
        0.3, ge=0, le=1, description="IoU above which a slice's box is a copy"
    )
    detections_per_img: int = Field(30, ge=1, description="most boxes kept on a slice")
    link_iou: float = Field(0.2, gt=0, le=1, description="IoU that links boxes of two slices")
    link_gap: int = Field(1, ge=0, description="slices without a box that a finding may bridge")
    link_score_ratio: float = Field(
        0.1, ge=0, le=1, description="lowest score of a finding's box, relative to its best"
    )
    score_depth_mm: float = Field(
        5.0, gt=0, description="depth over which a finding's best boxes are averaged, mm"
    )
    flips: bool = Field(
        True, description="average over the slices and their mirror images, at the first of scales"
    )
    scales: tuple[float, ...] = Field(
        (1.0, 0.8, 1.25),
        min_length=1,
        description="pixel sizes in which a scan is looked at, times that of training; the boxes are fused; "
        "a U-Net takes [1.0]",
    )
    score_thresh: float = Field(
        0.3,
        ge=0,
        le=1,
        description="lowest score of a finding; training sets it by operating_fp_per_scan",
    )
    operating_fp_per_scan: float = Field(
        0.25, ge=0, description="false positives per held-out scan that score_thresh lets through"
    )
    candidate_thresh: float = Field(
        0.05, ge=0, le=1, description="lowest score of a candidate, listed apart from the findings"
    )
    findings_per_scan: int = Field(
        100, ge=1, description="most findings and candidates listed for a scan"
    )
    components: ComponentsConfig = ComponentsConfig()

    @field_validator("scales")
    @classmethod
    def _plausible(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0.25 <= scale <= 4 for scale in value):
            raise ValueError("scales must be from 0.25 to 4")
        return value

    @property
    def looks(self) -> float:
        """How much work prediction is, against one look at each slice as it is."""
        views = MIRROR_IMAGES if self.flips else 1
        first, *others = self.scales
        return views / first**2 + sum(1 / scale**2 for scale in others)

    def plain(self, **changes: object) -> PredictConfig:
        """Return the settings of one look at each slice as it is, with ``changes`` to others."""
        return self.model_copy(update={"flips": False, "scales": (1.0,), **changes})
