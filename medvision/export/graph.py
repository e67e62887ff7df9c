"""A trained network as a graph that runs without medvision: written, read back, compared, kept."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from medvision.detector import DetectorConfig, load_detector
from medvision.errors import InputError, first_line, ran_out_of_memory
from medvision.export.check import Runner, check_volumes, compare
from medvision.export.engine import OnnxSession
from medvision.export.files import (
    DEFAULT_FILES,
    EXPORT_PACKAGES,
    INPUT_NAME,
    ExportedModel,
    ExportFormat,
    require_packages,
    save_exported,
)
from medvision.export.outputs import GraphOutputs, graph_module
from medvision.files import atomic_path, sha256_of
from medvision.progress import Progress, ProgressCallback, ignore_progress


@dataclass(frozen=True)
class Exported:
    """What an export left: the graph, the settings beside it, and how it was checked."""

    file: Path
    model: ExportedModel


def export_run(
    run: Path,
    file: Path | None = None,
    format: ExportFormat = "onnx",  # noqa: A002  (as the option is called)
    *,
    check: Path | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Exported:
    """Export the network of ``run`` to ``file``, which by default is in the run folder.

    Rows and columns stay free, and the batch of a model of one stage. The outputs of the written file
    are compared with the network's own in float32, on slices of the scan ``check``, or of the run's
    cached training scans, or of a computed phantom. Raises InputError, and leaves no file, if they
    differ by more than 1e-4 or the network cannot be exported; UsageError if an optional package is missing.
    """
    if format == "onnx":
        require_packages(EXPORT_PACKAGES, "Export to ONNX")
    on_progress(Progress("export", 0, 2, "steps", "load"))
    network, config, about = load_detector(run)
    outputs = GraphOutputs(config)
    images = _example(config, outputs)
    file = file or run / DEFAULT_FILES[format]
    with atomic_path(file) as temporary:
        on_progress(Progress("export", 0, 2, "steps", f"write {format}"))
        with torch.inference_mode():
            names = list(outputs.of(network, network(images))[0])
            write = _WRITERS[format]
            runner = write(graph_module(network, outputs), names, images, temporary)
        on_progress(Progress("export", 1, 2, "steps", "compare"))
        outcome = compare(network, runner, config, *check_volumes(run, config, check))
        digest = sha256_of(temporary)
    model = ExportedModel(
        format=format,
        file_sha256=digest,
        size_multiple=config.model.strides[-1],
        strides=tuple(config.model.strides),
        input_layout=f"[{1 if outputs.single else 'batch'}, slice, row, column] float32, 0..1",
        outputs={name: outputs.layouts[name] for name in names},
        about=about,
        detector=config,
        check=outcome,
    )
    save_exported(file, model)
    on_progress(Progress("export", 2, 2, "steps"))
    return Exported(file, model)


def _write_onnx(module: nn.Module, names: list[str], images: Tensor, path: Path) -> Runner:
    free = {2: torch.export.Dim("rows", min=1), 3: torch.export.Dim("columns", min=1)}
    if len(images) > 1:
        free[0] = torch.export.Dim("batch", min=1)
    try:
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            input_names=[INPUT_NAME],
            output_names=names,
            dynamic_shapes=(free,),
            verbose=False,
        )
        # One file: weights beside it would be lost when it is copied.
        program.save(str(path), external_data=False)  # type: ignore[union-attr]
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(
            "torch cannot export this network to ONNX.",
            why=first_line(error),
            do="Use --format torchscript, or another version of torch.",
        ) from error
    return OnnxSession(path)


def _write_torchscript(module: nn.Module, names: list[str], images: Tensor, path: Path) -> Runner:
    with warnings.catch_warnings():
        # torch calls it deprecated, but C++ programs and many viewers read nothing else.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, images)
        torch.jit.save(traced, str(path))
        loaded = torch.jit.load(str(path))

    def run(images: Tensor) -> dict[str, Tensor]:
        try:
            return dict(zip(names, loaded(images), strict=True))
        except RuntimeError as error:
            if ran_out_of_memory(error):
                raise
            raise InputError(
                f"The traced graph fails on slices of {images.shape[-2]} x {images.shape[-1]} pixels.",
                why=str(error).strip().splitlines()[-1],
                do="Use --format onnx.",
            ) from error

    return run


_WRITERS = {"onnx": _write_onnx, "torchscript": _write_torchscript}


def _example(config: DetectorConfig, outputs: GraphOutputs) -> Tensor:
    """Return a batch to trace with, of one slice where the graph takes one at a time.

    No two of its sides are equal, so that none is taken for another.
    """
    stride = config.model.strides[-1]
    batch = 1 if outputs.single else 2
    return torch.rand(batch, config.stack.n_slices, 6 * stride, 8 * stride)
