"""What runs the network of a run: torch, or ONNX Runtime. Read without torch; loaded on demand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medvision.detector import DetectorConfig, load_detector_config, weights_path
from medvision.errors import UsageError
from medvision.export.files import ENGINE_PACKAGES, find_exported, require_packages

if TYPE_CHECKING:
    from medvision.predict import Predictor

ENGINES = ("torch", "onnx")


def check_run(run: Path, engine: str = "torch") -> DetectorConfig:
    """Return the settings of what ``load_predictor`` would load, without loading it.

    ``run`` is a run folder; with engine "onnx" it may be an exported file. Raises UsageError if it does not
    hold what the engine runs or the engine is not installed, InputError if its files are broken.
    """
    if engine not in ENGINES:
        raise UsageError(f"The engine must be {' or '.join(ENGINES)}; got {engine!r}.")
    if engine == "onnx":
        require_packages(ENGINE_PACKAGES, "--engine onnx")
        return find_exported(run)[1].detector
    config = load_detector_config(run)
    weights_path(run)
    return config


def load_predictor(run: Path, engine: str, device: str, score_thresh: float | None) -> Predictor:
    """Return what finds lesions in volumes; see ``Predictor`` for the last two arguments."""
    if engine == "onnx":
        from medvision.export.engine import OnnxPredictor

        return OnnxPredictor(run, device, score_thresh)
    from medvision.predict import Predictor

    return Predictor(run, device, score_thresh)
