"""A trained detector on disk: weights as safetensors, everything else as JSON. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medvision._version import __version__
from medvision.errors import InputError, UsageError, first_line
from medvision.files import atomic_path, atomic_write_text, sha256_of
from medvision.findings.config import PredictConfig
from medvision.models.family_config import ModelConfig
from medvision.stacks.config import StackConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

DETECTOR_FILE = "detector.json"
BEST_WEIGHTS = "best.safetensors"
LAST_WEIGHTS = "last.safetensors"


class DetectorConfig(BaseModel):
    """All that is needed to use the weights: what the network is, what it sees, what it names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    medvision_version: str = __version__
    class_names: tuple[str, ...] = Field(min_length=1)
    modality: str = Field("", description="modality of the training scans; empty: not known")
    stack: StackConfig
    model: ModelConfig
    predict: PredictConfig
    usual_lesion_mm: float | None = Field(
        None,
        gt=0,
        description="side that 95 of 100 lesion boxes on training slices do not exceed, mm; None: not known",
    )

    @property
    def pixel_mm(self) -> float:
        """In-plane pixel size that the network was trained on, mm."""
        if self.stack.pixel_mm is None:
            raise InputError(
                "A trained detector needs stack.pixel_mm; got none.",
                where=DETECTOR_FILE,
                do="Train again, or restore the file that training wrote.",
            )
        return self.stack.pixel_mm


def save_detector_config(run: Path, config: DetectorConfig) -> None:
    """Write ``run/detector.json``."""
    atomic_write_text(run / DETECTOR_FILE, config.model_dump_json(indent=2) + "\n")


def with_score_thresh(config: DetectorConfig, score_thresh: float | None) -> DetectorConfig:
    """Return ``config`` with another lowest score of a finding; as it is for None."""
    if score_thresh is None:
        return config
    update = {"score_thresh": score_thresh}
    return config.model_copy(update={"predict": config.predict.model_copy(update=update)})


def load_detector_config(run: Path) -> DetectorConfig:
    """Read ``run/detector.json``. UsageError if ``run`` holds no detector, InputError if it is broken."""
    path = run / DETECTOR_FILE
    if not path.is_file():
        raise UsageError(
            "A run folder must hold detector.json, which medvision train writes; there is none.",
            where=run,
            do="Give the folder that was named with medvision train -o.",
        )
    try:
        return DetectorConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(
            "detector.json is not one that medvision wrote.",
            where=path,
            why=first_line(error),
            do="Restore the file or train again.",
        ) from error


def weights_path(run: Path) -> Path:
    """Return the best weights of a run, or the last ones if none was validated yet."""
    for name in (BEST_WEIGHTS, LAST_WEIGHTS):
        if (run / name).is_file():
            return run / name
    raise UsageError(
        f"A run folder must hold {BEST_WEIGHTS} or {LAST_WEIGHTS}; it holds neither.",
        where=run,
        why="Training was stopped before it saved a checkpoint.",
        do="Go on with medvision train --resume.",
    )


def save_weights(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors as safetensors, with a small text table beside them, atomically."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()}, temporary, dict(about)
        )


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the text table of a safetensors file; InputError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            return tensors, dict(stream.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(
            "The weights are not a readable safetensors file.",
            where=path,
            why=str(error),
            do="Restore the file, or go on from another checkpoint.",
        ) from error


def load_detector(run: Path) -> tuple[nn.Module, DetectorConfig, dict[str, str]]:
    """Return the network with its weights, its settings, and what names it in every output.

    The names are ``run`` (the folder's name), ``weights_sha256`` and ``medvision_version``.
    """
    from medvision.models.family import build_model

    config = load_detector_config(run)
    path = weights_path(run)
    network = build_model(config.model, config.stack.n_slices, len(config.class_names))
    tensors, _ = load_weights(path)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            "The weights do not fit the network that detector.json describes.",
            where=path,
            why=" ".join(str(error).split())[:200],
            do="Keep both files of one run together.",
        ) from error
    about = {
        "run": run.resolve().name,
        "weights_sha256": sha256_of(path),
        "medvision_version": config.medvision_version,
    }
    return network.eval(), config, about


def to_json(value: object) -> str:
    """Return JSON that is strict (no NaN) and sorted, for the run folder's small files."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
