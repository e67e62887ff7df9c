"""Finding: one lesion that the model reports in a scan."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.geometry import Box, BoxMm


@dataclass(frozen=True)
class SliceBox:
    """The detector's box on one slice of the scan, in voxel edges of that scan.

    ``slice_index`` counts from 0; ``0 <= score <= 1``.
    """

    slice_index: int
    row_min: float
    column_min: float
    row_max: float
    column_max: float
    score: float


@dataclass(frozen=True)
class Finding:
    """A lesion in the scan's voxel grid and in the patient.

    ``finding_id`` counts from 1 in falling score, on through the candidates; it is the value in the
    label volume.
    ``class_scores`` holds the score of every class; ``score`` is the score of the finding as such.
    ``key_slice`` is the slice with the highest box score. ``diameter_mm`` is the longest in-plane
    diameter, ``volume_mm3`` that of the mask. ``mask`` has the shape of ``box.slices``.
    """

    finding_id: int
    class_name: str
    score: float
    box: Box
    box_mm: BoxMm
    center_mm: tuple[float, float, float]
    key_slice: int
    diameter_mm: float
    volume_mm3: float
    class_scores: dict[str, float] = field(default_factory=dict)
    slice_boxes: tuple[SliceBox, ...] = ()
    mask: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.score <= 1.0:
            raise InputError(f"A finding's score must be in 0..1; got {self.score}.")
        if self.finding_id < 1:
            raise InputError(f"A finding's id must be 1 or more; got {self.finding_id}.")


@dataclass(frozen=True)
class ScanFindings:
    """All findings of one scan, with what is needed to place them: its grid and its identifiers.

    ``shape`` is (slices, rows, columns). An empty ``findings`` means: looked, nothing found.
    ``candidates`` scored under ``score_thresh``: too doubtful to show a reader, and needed to draw
    sensitivity against false positives. Every finding scores as much as every candidate or more.
    ``model`` names the run that found them (name, SHA-256 of the weights, medvision version).
    """

    case_id: str
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    findings: tuple[Finding, ...]
    class_names: tuple[str, ...]
    modality: str = ""
    study_instance_uid: str = ""
    series_instance_uid: str = ""
    frame_of_reference_uid: str = ""
    notes: tuple[str, ...] = ()
    model: dict[str, str] = field(default_factory=dict)
    candidates: tuple[Finding, ...] = ()
    score_thresh: float = 0.0
