"""What a training run would be: its data, its network and its cost, found out without keeping anything."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from medvision.detector import DetectorConfig
from medvision.device import choose_device
from medvision.models.family import build_model
from medvision.models.unet_config import UNetConfig
from medvision.progress import ProgressCallback, StopCallback, ignore_progress, never_stop
from medvision.training.cache import CachedCase
from medvision.training.config import TrainConfig
from medvision.training.cost import Cost, measure_cost
from medvision.training.loop import Trainer
from medvision.training.prepare import TrainingData, count_lesions, fit_detector, prepare_data
from medvision.training.receptive_field import receptive_fields
from medvision.training.settings_help import DEFAULT, Setting, flat_settings, list_settings
from medvision.training.train import check_before_reading, make_trainer

PERCENTILES = (5, 25, 50, 75, 95)
FITTED = "fitted to the data"
BY_MODEL = "follows from the model"


@dataclass(frozen=True)
class LesionSizes:
    """How large the training lesions are: percentiles of the longer in-plane side of the box."""

    percentiles: tuple[int, ...]
    pixels: tuple[float, ...]
    mm: tuple[float, ...]


@dataclass(frozen=True)
class PyramidLevel:
    """One level of the pyramid against the lesions.

    ``lesions_in_field`` is the share of lesions that the receptive field holds whole, and
    ``lesions_under_a_cell`` that of lesions smaller than one cell, which the stride sets.
    """

    stride: int
    receptive_field: int
    receptive_field_mm: float
    anchor_sizes: tuple[tuple[float, float], ...]
    lesions_in_field: float
    lesions_under_a_cell: float


@dataclass(frozen=True)
class DryRun:
    """What ``train`` would do with the same arguments."""

    settings: tuple[Setting, ...]
    class_names: tuple[str, ...]
    training_scans: int
    validation_scans: int
    healthy_scans: int
    lesions: dict[str, int]
    held_out_lesions: dict[str, int]
    left_out: tuple[tuple[str, str], ...]
    refused: tuple[str, ...]
    pixel_mm: float
    sizes: LesionSizes
    parameters: int
    trained_parameters: int
    strides: tuple[int, ...]
    transfer: str
    levels: tuple[PyramidLevel, ...]
    cost: Cost
    device: str


def dry_run(
    data: Path,
    config: TrainConfig,
    sources: dict[str, str] | None = None,
    *,
    on_progress: ProgressCallback = ignore_progress,
    should_stop: StopCallback = never_stop,
) -> DryRun:
    """Prepare ``data``, build the network, take a few steps, and return what was learnt; keep nothing.

    Scans are cached in the temporary folder meanwhile, where they need the room that they would in a run.
    ``sources`` says by dotted name which settings are no defaults. Raises what ``train`` would raise
    on the same data and settings; Interrupted after a stop.
    """
    with tempfile.TemporaryDirectory(prefix="medvision-dry-run-") as folder:
        started = monotonic()
        device = choose_device(config.device, config.precision)
        check_before_reading(config)
        cases, pixel_mm = prepare_data(data, Path(folder), config, on_progress)
        prepared = monotonic() - started
        detector = fit_detector(cases, config, pixel_mm)
        trainer = make_trainer(config, detector, cases, device)
        sizes = lesion_sides(cases.training)
        # The cost first: its peak of memory must not be that of the receptive fields.
        cost = measure_cost(trainer, detector, cases, prepared, on_progress, should_stop)
        levels = describe_levels(detector, sizes)
        return DryRun(
            settings=_resolved(config, detector, sources or {}),
            class_names=detector.class_names,
            training_scans=len(cases.training),
            validation_scans=len(cases.validation),
            healthy_scans=sum(not case.annotations() for case in _all(cases)),
            lesions=count_lesions(cases.training),
            held_out_lesions=count_lesions(cases.validation),
            left_out=cases.left_out,
            refused=cases.refused,
            pixel_mm=detector.pixel_mm,
            sizes=_percentiles(sizes, detector.pixel_mm),
            parameters=sum(value.numel() for value in trainer.network.parameters()),
            trained_parameters=_trained(trainer),
            strides=tuple(detector.model.strides),
            transfer=trainer.plan.why,
            levels=levels,
            cost=cost,
            device=device.name,
        )


def _resolved(
    config: TrainConfig, detector: DetectorConfig, sources: dict[str, str]
) -> tuple[Setting, ...]:
    """Return the settings as the run would use them, with what was fitted in place of what was open."""
    # A U-Net draws no boxes to fuse: it looks in one size, whoever set nothing.
    by_model = {"predict.scales"} if isinstance(config.model, UNetConfig) else set()
    fitted = config.model_copy(update={"stack": detector.stack, "model": detector.model})
    before = dict(flat_settings(config))
    return tuple(
        item._replace(source=_source(item, before, by_model))
        for item in list_settings(fitted, sources)
    )


def _source(item: Setting, before: dict[str, object], by_model: set[str]) -> str:
    if before.get(item.name) != item.value:
        return FITTED
    return BY_MODEL if item.name in by_model and item.source == DEFAULT else item.source


def lesion_sides(cases: list[CachedCase]) -> NDArray[np.float64]:
    """Return ``[n]`` the longer in-plane side of the box of every lesion that counts, pixels."""
    boxes = [item.box for case in cases for item in case.annotations() if not item.ignore]
    sides = [max(box.row_max - box.row_min, box.column_max - box.column_min) for box in boxes]
    return np.array(sides, dtype=float)


def _percentiles(sides: NDArray[np.float64], pixel_mm: float) -> LesionSizes:
    pixels = tuple(np.percentile(sides, PERCENTILES).round(1).tolist())
    return LesionSizes(PERCENTILES, pixels, tuple(round(side * pixel_mm, 1) for side in pixels))


def describe_levels(
    detector: DetectorConfig, sides: NDArray[np.float64]
) -> tuple[PyramidLevel, ...]:
    """Return the levels of the network's pyramid against the lesions' ``sides`` (pixels).

    A U-Net's levels are the maps of its decoder. The network is a new one: no convolution has moved yet.
    """
    model = detector.model
    network = build_model(model, detector.stack.n_slices, len(detector.class_names))
    part = "pyramid" if hasattr(network, "pyramid") else "decoder"
    fields = receptive_fields(network, part, detector.stack.n_slices, model.strides[-1])
    anchors = getattr(model, "anchor_sizes", ()) or [()] * len(fields)
    return tuple(
        PyramidLevel(
            stride=stride,
            receptive_field=field,
            receptive_field_mm=round(field * detector.pixel_mm, 1),
            anchor_sizes=tuple(shapes),
            lesions_in_field=float((sides <= field).mean()),
            lesions_under_a_cell=float((sides < stride).mean()),
        )
        # A decoder has no map of its own at the coarsest stride.
        for stride, field, shapes in zip(model.strides, fields, anchors, strict=False)
    )


def _trained(trainer: Trainer) -> int:
    return sum(value.numel() for value in trainer.network.parameters() if value.requires_grad)


def _all(cases: TrainingData) -> list[CachedCase]:
    return [*cases.training, *cases.validation]
