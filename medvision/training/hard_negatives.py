"""Places of healthy tissue that the network takes for lesions, so that it is shown them again.

Bootstrapping in the sense of Sung and Poggio (1998): after half of the run the averaged network looks at the
training scans, and its false positives become crops of their own.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from medvision.detector import DetectorConfig, to_json
from medvision.device import Device
from medvision.errors import InputError
from medvision.files import atomic_write_text
from medvision.findings.finding import Finding
from medvision.labels.annotation import Annotation
from medvision.models.retinanet import RetinaNet
from medvision.predict import find_lesions
from medvision.progress import Progress, ProgressCallback
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
    network: RetinaNet,
    config: DetectorConfig,
    cases: list[CachedCase],
    device: Device,
    on_progress: ProgressCallback,
) -> list[HardNegative]:
    """Return the findings on training scans that touch no lesion and no region to ignore."""
    update = {"flips": False, "score_thresh": _LEAST_SCORE, "findings_per_scan": _MOST_PER_SCAN}
    config = config.model_copy(update={"predict": config.predict.model_copy(update=update)})
    found = []
    for number, case in enumerate(cases):
        annotations = case.annotations()
        for finding in find_lesions(case.volume, network, config, device):
            if not any(_touches(finding, item) for item in annotations):
                center = finding.box.center_index
                found.append(
                    HardNegative(
                        number, finding.key_slice, float(center[1]), float(center[2]), finding.score
                    )
                )
        on_progress(Progress("find hard negatives", number + 1, len(cases), "scans"))
    return found


def _touches(finding: Finding, annotation: Annotation) -> bool:
    low = np.maximum(finding.box.lower, annotation.box.lower)
    high = np.minimum(finding.box.upper, annotation.box.upper)
    # A slice apart still touches: where a lesion ends is not sure.
    return bool((high - low > np.array([-1.01, 0.0, 0.0])).all())


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
