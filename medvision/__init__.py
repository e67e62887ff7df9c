"""medvision finds rare, small lesions in medical scans. For research use only.

    scan files -> Volume -> SliceStack -> detections -> Findings -> files a radiologist opens
    label files -> Annotations -+ (train)                  +-> with Annotations -> errors -> report

The names below are all that a notebook needs; each is imported when it is first used, so that
``import medvision`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medvision._version import __version__

if TYPE_CHECKING:
    from medvision.evaluation.evaluate import evaluate
    from medvision.labels.masks import read_labels
    from medvision.outputs.json_csv import write_findings
    from medvision.outputs.json_reader import read_findings
    from medvision.predict import Predictor
    from medvision.scans.load import find_scans, read_scan
    from medvision.training.config import TrainConfig
    from medvision.training.train import train

_HOMES = {
    "find_scans": "medvision.scans.load",
    "read_scan": "medvision.scans.load",
    "read_labels": "medvision.labels.masks",
    "TrainConfig": "medvision.training.config",
    "train": "medvision.training.train",
    "Predictor": "medvision.predict",
    "write_findings": "medvision.outputs.json_csv",
    "read_findings": "medvision.outputs.json_reader",
    "evaluate": "medvision.evaluation.evaluate",
}

__all__ = [
    "Predictor",
    "TrainConfig",
    "__version__",
    "evaluate",
    "find_scans",
    "read_findings",
    "read_labels",
    "read_scan",
    "train",
    "write_findings",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'medvision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
