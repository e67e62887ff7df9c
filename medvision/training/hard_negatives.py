"""Places of healthy tissue that the network takes for lesions, so that it is shown them again.

Bootstrapping in the sense of Sung and Poggio (1998): after half of the run the averaged network looks at the
training scans, and its false positives become crops of their own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from medvision.detector import DetectorConfig, to_json
from medvision.device import Device
from medvision.errors import InputError
from medvision.files import atomic_write_text
from medvision.findings.finding import Finding
from medvision.findings.merge import SliceDetections
from medvision.geometry import Box
from medvision.labels.annotation import Annotation
from medvision.models.family_config import ModelConfig
from medvision.predict import detect_slices, find_lesions
from medvision.progress import Progress, ProgressCallback
from medvision.stacks.config import StackConfig
from medvision.stacks.crops import body_box
from medvision.training.cache import CachedCase

HARD_NEGATIVES_FILE = "hard_negatives.json"
_LEAST_SCORE = 0.05
_MOST_PER_SCAN = 20


@dataclass(frozen=True)
class HardNegative:
    """A false positive on a training scan: case number, slice, centre (row, column) and score."""

    case: int
    plane: int
    row: float
    column: float
    score: float


def find_hard_negatives(
    network: nn.Module,
    config: DetectorConfig,
    cases: list[CachedCase],
    device: Device,
    on_progress: ProgressCallback,
) -> list[HardNegative]:
    """Return the boxes on training scans that touch no lesion and no region to ignore, best first a scan.

    Slices ``slice_offset_mm`` to twice that apart are looked at: those between show the same again.
    A model that draws no boxes is asked for findings, each of which stands for its key slice.
    """
    settings = config.predict.plain(box_score_thresh=_LEAST_SCORE, batch_size=16)
    config = config.model_copy(update={"predict": settings})
    found = []
    for number, case in enumerate(cases):
        volume = case.volume
        if config.model.name == "unet":
            boxes = _of_findings(find_lesions(volume, network, config, device))
        else:
            window = body_box(volume.array, volume.source.modality or config.modality)
            every = slices_apart(config.model, config.stack, volume.spacing_mm[0])
            boxes = detect_slices(volume, window, network, config, device, every=every)
        found += _false_ones(number, boxes, case.annotations())
        on_progress(Progress("find hard negatives", number + 1, len(cases), "scans"))
    return found


def slices_apart(model: ModelConfig, stack: StackConfig, spacing_mm: float) -> int:
    """Return every how many slices of a scan are looked at for hard negatives; of a U-Net each one."""
    if model.name == "unet":
        return 1
    return max(1, int(2 * stack.slice_offset_mm / spacing_mm + 0.01))


def _of_findings(findings: tuple[Finding, ...]) -> SliceDetections:
    edges = [(f.box.column_min, f.box.row_min, f.box.column_max, f.box.row_max) for f in findings]
    return SliceDetections(
        np.array([finding.key_slice for finding in findings], dtype=np.int64),
        np.array(edges, dtype=float).reshape(-1, 4),
        np.array([finding.score for finding in findings], dtype=float),
        np.ones((len(findings), 1)),
    )


def _false_ones(
    number: int, detections: SliceDetections, annotations: tuple[Annotation, ...]
) -> list[HardNegative]:
    places = []
    for row in np.argsort(-detections.scores, kind="stable"):
        plane, box = int(detections.slice_index[row]), detections.boxes[row]
        if not any(_touches(plane, box, annotation.box) for annotation in annotations):
            x, y = ((box[:2] + box[2:]) / 2).tolist()
            places.append(HardNegative(number, plane, y, x, float(detections.scores[row])))
    return places[:_MOST_PER_SCAN]


def _touches(plane: int, box: NDArray[np.float64], lesion: Box) -> bool:
    # A slice apart still touches: where a lesion ends is not sure.
    near = lesion.slice_min - 1 <= plane <= lesion.slice_max
    x1, y1, x2, y2 = box.tolist()
    beside = x2 <= lesion.column_min or x1 >= lesion.column_max
    return bool(near and not beside and y2 > lesion.row_min and y1 < lesion.row_max)


def save_hard_negatives(run: Path, step: int, found: list[HardNegative]) -> None:
    """Write them with the step they were found at, for a resumed run."""
    values = {"step": step, "places": [asdict(item) for item in found]}
    atomic_write_text(run / HARD_NEGATIVES_FILE, to_json(values))


def load_hard_negatives(run: Path, step: int) -> list[HardNegative] | None:
    """Return those found at or before ``step``; None if that is still to be done."""
    path = run / HARD_NEGATIVES_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["step"] > step:
            return None
        return [HardNegative(**item) for item in values["places"]]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{HARD_NEGATIVES_FILE} is not one that medvision wrote.", where=path, why=str(error)
        ) from error
