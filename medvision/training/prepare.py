"""A folder of scans -> what a run trains on: cached cases, classes, split, fitted settings."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvision.datasets.discover import Case, find_cases, load_case
from medvision.datasets.split import split_cases
from medvision.detector import DetectorConfig
from medvision.errors import InputError, MedvisionError, UsageError
from medvision.geometry import spacing_of
from medvision.models.anchors import AnchorSizes, fit_anchor_sizes, shape_iou
from medvision.models.family import NEED_MASKS
from medvision.models.family_config import ModelConfig
from medvision.models.roi_levels import fit_level_rule
from medvision.models.two_stage_config import MaskRCNNConfig, TwoStageConfig
from medvision.models.unet_config import UNetConfig
from medvision.progress import Progress, ProgressCallback
from medvision.scans.load import LABEL_FOLDER
from medvision.stacks.config import StackConfig
from medvision.training.cache import CachedCase, cache_case
from medvision.training.config import TrainConfig
from medvision.training.settings_help import suggestion

CACHE_FOLDER = "cache"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """The two sides of the split and what was left out, with reasons; ``refused`` are the labelled of these."""

    training: list[CachedCase]
    validation: list[CachedCase]
    class_names: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    refused: tuple[str, ...] = ()


def prepare_data(
    data: Path, run: Path, config: TrainConfig, on_progress: ProgressCallback
) -> tuple[TrainingData, float]:
    """Read, resample and cache all cases of ``data``; return them split, and the pixel size in mm.

    One bad case never stops the rest: it is left out and named. Raises InputError if no case or no
    lesion is left, or no lesion has an outline and the model draws outlines; UsageError if a class weight
    is of a class that no lesion has.
    """
    dataset = find_cases(data)
    left_out = [(name, "no label file: unlabelled, not healthy") for name in dataset.unlabelled]
    left_out += [(Path(place).name, problem) for place, problem in dataset.problems]
    pixel_mm = config.stack.pixel_mm
    if pixel_mm is None:
        pixel_mm = _median_pixel_mm(data, dataset.cases, left_out)
    cached: list[CachedCase] = []
    used: list[Case] = []
    refused: list[str] = []
    for number, case in enumerate(dataset.cases, start=1):
        try:
            item = cache_case(load_case(case), run / CACHE_FOLDER, pixel_mm, config.stack.window_hu)
            cached.append(item)
            used.append(case)
        except MedvisionError as error:
            refused.append(case.case_id)
            left_out.append((case.case_id, str(error)))
        on_progress(Progress("prepare", number, len(dataset.cases), "scans"))
    training, validation = _split(used, cached, config)
    classes = _class_names(training)
    if not classes:
        raise InputError(
            f"Training needs at least one lesion; none is in the {len(training)} training scans.",
            where=data,
            why=_first_reason(left_out),
            do="Check that labels/ holds a label volume for each scan, with values above 0 on lesions.",
        )
    _check_class_weights(classes, config)
    _check_outlines(training, classes, config.model, data)
    return TrainingData(training, validation, classes, tuple(left_out), tuple(refused)), pixel_mm


def _check_class_weights(classes: tuple[str, ...], config: TrainConfig) -> None:
    for name in config.class_weights:
        if name not in classes:
            raise UsageError(
                f"Setting 'class_weights' names a class that no lesion has: {name!r}.",
                do=suggestion(name, classes),
            )


def _check_outlines(
    training: list[CachedCase], classes: tuple[str, ...], model: ModelConfig, data: Path
) -> None:
    """Refuse lesions without outlines for a model that draws them: what nobody taught would look like truth."""
    if model.name not in NEED_MASKS:
        return
    outlined = count_lesions(training, outlined=True)
    if not outlined:
        boxed = "faster-rcnn" if isinstance(model, MaskRCNNConfig) else "retinanet"
        raise InputError(
            f"Model {model.name} learns to draw outlines and needs at least one lesion with an outline; "
            f"all {sum(count_lesions(training).values())} in the {len(training)} training scans have a box "
            "alone.",
            where=data,
            do=f"Put label volumes into labels/, or train --model {boxed}, which learns from boxes.",
        )
    missing = [name for name in classes if name not in outlined]
    if missing and isinstance(model, MaskRCNNConfig) and model.mask.per_class:
        raise InputError(
            "With model.mask.per_class each class needs a lesion with an outline; of "
            f"{', '.join(missing)} all have a box alone.",
            where=data,
            do="Set model.mask.per_class=false, or put label volumes of these lesions into labels/.",
        )


def _first_reason(left_out: list[tuple[str, str]]) -> str | None:
    if not left_out:
        return "Every scan is healthy."
    name, reason = left_out[0]
    return f"{len(left_out)} left out; the first is {name}: {reason.splitlines()[0]}"


def _median_pixel_mm(data: Path, cases: tuple[Case, ...], left_out: list[tuple[str, str]]) -> float:
    """Return the median in-plane pixel of up to 50 scans, spread over the data."""
    sizes = []
    for case in cases[:: max(1, len(cases) // 50)]:
        try:
            sizes.append(spacing_of(load_case(case).volume.affine)[1:])
        except MedvisionError as error:
            logger.info("%s left out of the pixel size: %s", case.case_id, error.what)
    if not sizes:
        raise InputError(
            "Training needs at least one readable scan with labels; there is none.",
            where=data,
            why=_first_reason(left_out),
            do=f"Pass {data.parent}, which holds labels/."
            if (data.parent / LABEL_FOLDER).is_dir()
            else "Put labels into labels/ beside scans/, with the scans' names.",
        )
    return round(float(np.median(sizes)), 4)


def _split(
    used: list[Case], cached: list[CachedCase], config: TrainConfig
) -> tuple[list[CachedCase], list[CachedCase]]:
    by_id = {item.case_id: item for item in cached}
    if config.validation_fraction == 0:
        return cached, []
    classes = {
        item.case_id: {item.classes[label] for label in set(item.classes) - item.ignored}
        for item in cached
    }
    training, validation = split_cases(used, classes, config.validation_fraction, config.seed)
    return [by_id[case.case_id] for case in training], [by_id[case.case_id] for case in validation]


def _class_names(cases: list[CachedCase]) -> tuple[str, ...]:
    names = {item.classes[label] for item in cases for label in set(item.classes) - item.ignored}
    return tuple(sorted(names))


def count_lesions(cases: list[CachedCase], *, outlined: bool = False) -> dict[str, int]:
    """Return the number of lesions of each class that count; if ``outlined``, of those with an outline."""
    return dict(
        Counter(
            item.classes[label]
            for item in cases
            for label in sorted(set(item.classes) - item.ignored)
            if not (outlined and label in item.boxed)
        )
    )


def slice_box_sizes(cases: list[CachedCase]) -> NDArray[np.float64]:
    """Return ``[n, 2]`` width and height in pixels of every lesion on every slice it is on."""
    boxes = [lesion.box for case in cases for lesion in case.slice_boxes()]
    edges = np.array(boxes, dtype=float).reshape(-1, 4)
    return edges[:, 2:] - edges[:, :2]


def fit_detector(data: TrainingData, config: TrainConfig, pixel_mm: float) -> DetectorConfig:
    """Return the settings of the detector with anchors fitted to the training lesions."""
    sizes = slice_box_sizes(data.training)
    model = fit_model(config.model, sizes, config.seed)
    modalities = Counter(case.modality for case in data.training if case.modality)
    return DetectorConfig(
        class_names=data.class_names,
        modality=modalities.most_common(1)[0][0] if modalities else "",
        stack=StackConfig(**{**config.stack.model_dump(), "pixel_mm": pixel_mm}),
        model=model,
        predict=config.predict,
        usual_lesion_mm=round(usual_side(sizes) * pixel_mm, 2) if len(sizes) else None,
    )


def usual_side(sizes: NDArray[np.float64]) -> float:
    """Return the side that 95 of 100 boxes ``sizes[n, 2]`` do not exceed; larger ones are few to learn from."""
    return float(np.percentile(sizes.max(axis=1), 95))


def fit_model(model: ModelConfig, sizes: NDArray[np.float64], seed: int) -> ModelConfig:
    """Return ``model`` with what is left open fitted to boxes ``sizes[n, 2]``, width and height in pixels."""
    if isinstance(model, UNetConfig):
        return model
    fitted: dict[str, object] = {}
    if not model.anchor_sizes:
        count = len(model.strides)
        anchors = fit_anchor_sizes(sizes, count, model.anchors_per_level, model.strides, seed)
        fitted["anchor_sizes"] = anchors
        _log_coverage(sizes, anchors)
    if isinstance(model, TwoStageConfig) and model.level_rule.k0 is None:
        k0, canonical = fit_level_rule(sizes, model.strides)
        fitted["level_rule"] = {"k0": k0, "canonical_size": canonical}
    return type(model).model_validate({**model.model_dump(), **fitted})


def _log_coverage(sizes: NDArray[np.float64], anchor_sizes: AnchorSizes) -> None:
    shapes = np.array([shape for level in anchor_sizes for shape in level])
    best = shape_iou(sizes, shapes).max(axis=1)
    logger.info(
        "Anchors fitted to %d slice boxes: mean best IoU %.2f, lowest %.2f",
        len(sizes),
        best.mean(),
        best.min(),
    )
