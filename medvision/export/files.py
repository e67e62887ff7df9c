"""An exported model on disk: the graph in one file, and the settings to use it beside it as JSON.

Read without torch, so that a wrong path is told at once.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medvision.detector import (
    DetectorConfig,
    load_detector_config,
    weights_path,
    with_score_thresh,
)
from medvision.errors import InputError, UsageError, first_line
from medvision.files import atomic_write_text, sha256_of

ExportFormat = Literal["onnx", "torchscript"]
DEFAULT_FILES: dict[ExportFormat, str] = {"onnx": "model.onnx", "torchscript": "model.pt"}
"""Names of exported files in a run folder; the first is where ``predict --engine onnx`` looks."""

INPUT_NAME = "images"
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ENGINE_PACKAGES = ("onnxruntime",)


class ExportCheck(BaseModel):
    """What the exported outputs were compared on with those of the network itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="where the slices came from, in words")
    slices: int = Field(ge=1)
    sizes: tuple[tuple[int, int], ...] = Field(description="rows and columns that were tried")
    largest_difference: float = Field(ge=0, description="relative where a value is above 1")
    tolerance: float = Field(gt=0)


class ExportedModel(BaseModel):
    """All that is needed to use an exported file, without the run folder.

    The input is ``[batch, slice, row, column]`` float32: ``detector.stack`` says how many slices, how
    far apart (mm), at which pixel size (mm), and which values become 0 and 1 (``window_hu``). Rows and
    columns are multiples of ``size_multiple``. ``outputs`` names the outputs in order with their layout.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: ExportFormat
    file_sha256: str
    input_name: str = INPUT_NAME
    input_layout: str
    size_multiple: int = Field(ge=1)
    strides: tuple[int, ...] = Field(description="of the pyramid levels, pixels, finest first")
    outputs: dict[str, str]
    about: dict[str, str] = Field(description="run, weights_sha256, medvision_version")
    detector: DetectorConfig
    check: ExportCheck


def settings_path(file: Path) -> Path:
    """Return where the settings of an exported ``file`` are: model.onnx has model.onnx.json."""
    return file.with_name(f"{file.name}.json")


def save_exported(file: Path, exported: ExportedModel) -> None:
    """Write the settings beside ``file``."""
    atomic_write_text(settings_path(file), exported.model_dump_json(indent=2) + "\n")


def load_exported(file: Path) -> ExportedModel:
    """Read the settings beside ``file``.

    UsageError if either file is missing; InputError if they are broken or do not belong together.
    """
    path = settings_path(file)
    for one in (file, path):
        if not one.is_file():
            raise UsageError(
                "An exported model is two files, the graph and its settings; one is missing.",
                where=one,
                do="Export it with medvision export, and keep both files together.",
            )
    try:
        exported = ExportedModel.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(
            "The settings of the exported model are not those that medvision wrote.",
            where=path,
            why=first_line(error),
            do="Export it again with medvision export.",
        ) from error
    if sha256_of(file) != exported.file_sha256:
        raise InputError(
            "The exported model does not match the checksum in its settings.",
            where=file,
            why="One of the two files was changed, or is damaged.",
            do="Export it again with medvision export.",
        )
    return exported


def find_exported(run: Path) -> tuple[Path, ExportedModel]:
    """Return the ONNX file of ``run`` with its settings; ``run`` may be that file itself.

    UsageError if there is none, or if it was exported from other weights or settings than the run now has.
    """
    if not run.is_dir():
        return run, _only_onnx(run, load_exported(run))
    file = run / DEFAULT_FILES["onnx"]
    again = f"medvision export {run} --format onnx"
    if not file.is_file():
        raise UsageError(
            "The run has not been exported to ONNX yet.", where=file, do=f"Run {again}."
        )
    exported = _only_onnx(file, load_exported(file))
    if sha256_of(weights_path(run)) != exported.about.get("weights_sha256"):
        raise UsageError(
            "The exported model has other weights than the run: it was trained on since.",
            where=file,
            do=f"Run {again}.",
        )
    now = load_detector_config(run)
    if with_score_thresh(now, exported.detector.predict.score_thresh) != exported.detector:
        raise UsageError(
            "The exported model has other settings than the run now has.",
            where=file,
            do=f"Run {again}.",
        )
    # That threshold is set anew by a validation, and the graph knows nothing of it.
    return file, exported.model_copy(update={"detector": now})


def _only_onnx(file: Path, exported: ExportedModel) -> ExportedModel:
    if exported.format != "onnx":
        raise UsageError(f"ONNX Runtime cannot run a {exported.format} file.", where=file)
    return exported


def require_packages(names: tuple[str, ...], what: str) -> None:
    """Raise UsageError with the command that installs them, if optional packages are missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{what} needs packages that are not installed: {', '.join(missing)}.",
            do=f"Run: python -m pip install {' '.join(missing)}",
        )
