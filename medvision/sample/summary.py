"""What a sample holds, and the manifest that says which of its parts are finished."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from medvision.files import atomic_write_text
from medvision.sample.cases import MadeCase

MANIFEST = "sample.json"


class PartSummary(BaseModel):
    """Counts of one part; ``diameters_mm`` are the nodules' longest in-plane diameters."""

    model_config = ConfigDict(frozen=True)

    scans: int
    healthy_scans: int = 0
    class_counts: dict[str, int] = Field(default_factory=dict)
    decoy_counts: dict[str, int] = Field(default_factory=dict)
    diameters_mm: tuple[float, ...] = ()

    @property
    def nodules(self) -> int:
        """Number of nodules to find."""
        return sum(self.class_counts.values())

    @property
    def median_diameter_mm(self) -> float:
        """Median diameter in mm, NaN where there are no nodules."""
        return float(np.median(self.diameters_mm)) if self.diameters_mm else float("nan")


class Manifest(BaseModel):
    """The content of sample.json: the configuration's digest and the finished parts."""

    config_sha256: str
    parts: dict[str, PartSummary] = Field(default_factory=dict)


class SampleSummary(NamedTuple):
    """Where the sample is and what its parts hold."""

    folder: Path
    parts: dict[str, PartSummary]

    def path(self, part: str) -> Path:
        """Return the folder of a part: series, series_truth, train or test."""
        return self.folder / part


def summarize(cases: Sequence[MadeCase]) -> PartSummary:
    """Count the cases' nodules by class and their decoys by kind."""
    donated = [nodule for case in cases for nodule in case.donated]
    return PartSummary(
        scans=len(cases),
        healthy_scans=sum(not case.donated for case in cases),
        class_counts=dict(sorted(Counter(n.class_name for n in donated).items())),
        decoy_counts=dict(sorted(Counter(d.kind for c in cases for d in c.decoys).items())),
        diameters_mm=tuple(round(n.diameter_mm, 3) for n in donated),
    )


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a sample, or None where there is none that can be read."""
    try:
        return Manifest.model_validate(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write sample.json atomically."""
    atomic_write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
