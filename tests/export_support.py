"""What the tests of export share: a detector of two classes, and whether ONNX is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from medvision.detector import DetectorConfig
from medvision.export.files import EXPORT_PACKAGES
from medvision.findings.config import PredictConfig
from medvision.models.family_config import ModelConfig
from medvision.stacks.config import StackConfig

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in EXPORT_PACKAGES),
    reason="onnx, onnxscript and onnxruntime are optional",
)


def small_detector(model: ModelConfig) -> DetectorConfig:
    """Return the settings of a detector on three slices that keeps every box."""
    return DetectorConfig(
        class_names=("dark", "bright"),
        modality="CT",
        stack=StackConfig(n_slices=3, pixel_mm=0.7),
        model=model,
        predict=PredictConfig(score_thresh=0.0, box_score_thresh=0.0, batch_size=5),
    )
