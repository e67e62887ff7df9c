"""What the tests of training share: a run of seconds, and a case with lesions where a test wants them."""

from __future__ import annotations

from pathlib import Path

import pytest

from medvision.datasets.discover import Case, LoadedCase
from medvision.errors import Interrupted
from medvision.labels.annotation import Annotation
from medvision.progress import Progress
from medvision.sample_data.phantoms import make_phantom
from medvision.scans.load import ScanReference
from medvision.training.config import TrainConfig, make_train_config
from medvision.training.train import train


class StopAt:
    """Ask to stop once training has reported ``step``."""

    def __init__(self, step: int) -> None:
        self.step, self.reached = step, False

    def report(self, progress: Progress) -> None:
        self.reached |= progress.stage == "train" and progress.done >= self.step

    def stop(self) -> int | None:
        return 15 if self.reached else None


def train_until(step: int, data: Path, run: Path, config: TrainConfig) -> None:
    """Train and stop after ``step``, as a signal would."""
    stopper = StopAt(step)
    with pytest.raises(Interrupted):
        train(data, run, config, on_progress=stopper.report, should_stop=stopper.stop)


def small(**changes: object) -> TrainConfig:
    """Return the settings of a run of six steps of a tiny network, without a time limit."""
    values: dict[str, object] = {
        "steps": 6,
        "batch_size": 2,
        "validations": 1,
        "max_minutes": 0,
        "precision": "float32",
        "validation_fraction": 0.3,
        "stack": {"n_slices": 3},
        "sampling": {"crop_size": 32},
        "model": {"width": 8, "pyramid_channels": 8, "head_depth": 1},
    }
    return make_train_config({**values, **changes}, "test")


def case_with(*annotations: Annotation, shape: tuple[int, int, int] = (24, 64, 48)) -> LoadedCase:
    """Return a healthy phantom on which a reader marked ``annotations``."""
    fields = dict.fromkeys(ScanReference.__dataclass_fields__, "")
    fields.update(case_id="one", path=Path("one.nii.gz"), n_files=1, kind="image")  # type: ignore[arg-type]
    case = Case("one", ScanReference(**fields), Path(), "p")  # type: ignore[arg-type]
    return LoadedCase(case, make_phantom(n_lesions=0, shape=shape).volume, annotations)
