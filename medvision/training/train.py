"""Train a detector on a folder of scans: the story of a run, from cases to a run folder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from medvision.detector import (
    BEST_WEIGHTS,
    LAST_WEIGHTS,
    DetectorConfig,
    load_detector_config,
    save_detector_config,
    to_json,
)
from medvision.device import Device, choose_device
from medvision.errors import UsageError
from medvision.files import atomic_write_text, remove_partial
from medvision.models.family import (
    ENCODERS,
    OUTPUTS,
    build_criterion,
    build_model,
    check_backbone,
)
from medvision.models.family_config import backbone_name, must_learn
from medvision.models.weights import check_weights, load_pretrained
from medvision.progress import ProgressCallback, StopCallback, ignore_progress, never_stop
from medvision.training.checkpoint import TrainState, restore_checkpoint
from medvision.training.config import CONFIG_FILE, TrainConfig
from medvision.training.hard_negatives import HARD_NEGATIVES_FILE
from medvision.training.loop import Trainer
from medvision.training.prepare import TrainingData, count_lesions, fit_detector, prepare_data
from medvision.training.recall import ALL
from medvision.training.resume import SPLIT_FILE, check_same_split, open_run
from medvision.training.session import METRICS_FILE, Session
from medvision.training.transfer import (
    TransferPlan,
    choose_transfer,
    parameter_groups,
    plan_transfer,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSummary:
    """What a run did. Figures of validation are None where no lesion was held out.

    ``proposal_recall`` is of the two-stage models alone. ``left_out`` has scans and files with the reason;
    ``refused`` are the scans among them that have labels, and could not be used.
    """

    run: Path
    steps: int
    planned_steps: int
    seconds: float
    training_scans: int
    validation_scans: int
    lesions: dict[str, int]
    left_out: tuple[tuple[str, str], ...]
    refused: tuple[str, ...]
    validation_cpm: float | None
    validation_sensitivity_at_1_fp: float | None
    proposal_recall: float | None
    best_step: int
    skipped_steps: int
    device: str
    transfer: str
    was_finished: bool = False
    """Nothing was left to do when this sitting began."""


def train(
    data: Path,
    run: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    on_progress: ProgressCallback = ignore_progress,
    should_stop: StopCallback = never_stop,
) -> TrainSummary:
    """Train on ``data`` and leave in ``run`` all that predict, resume and a reader need.

    With ``resume`` a stopped run goes on where it was, on the same data and settings: on a CPU it ends
    with the same weights to the bit as one that was never stopped (if no time limit cut it short).
    Raises UsageError if ``run`` already holds a run and ``resume`` is off, or another process trains
    into it; Interrupted after a stop, with a checkpoint saved.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(
            "Another medvision train is writing into this run folder.",
            where=run,
            do="Wait for it, or train into another folder.",
        ) from error
    try:
        remove_partial(run)
        state = open_run(run, config, resume)
        return _train(data, run, config, state, on_progress, should_stop)
    finally:
        lock.release()


def _train(
    data: Path,
    run: Path,
    config: TrainConfig,
    state: TrainState,
    on_progress: ProgressCallback,
    should_stop: StopCallback,
) -> TrainSummary:
    device = choose_device(config.device, config.precision)
    if not state.step:
        check_before_reading(config)
    if state.step:
        detector = load_detector_config(run)
        fitted = config.model_copy(update={"stack": detector.stack})
        cases, _ = prepare_data(data, run, fitted, on_progress)
        check_same_split(run, cases)
    else:
        cases, pixel_mm = prepare_data(data, run, config, on_progress)
        detector = fit_detector(cases, config, pixel_mm)
        _write_run_files(run, config, detector, cases)
    trainer = make_trainer(config, detector, cases, device, resumed=state.step > 0)
    if state.step:
        restore_checkpoint(run, state, trainer.network, trainer.average, trainer.optimizer)
    session = Session(run, config, detector, cases, trainer, state, on_progress, should_stop)
    was_finished = state.finished
    last = session.go()
    return TrainSummary(
        run=run,
        steps=state.step,
        planned_steps=config.steps,
        seconds=state.seconds,
        training_scans=len(cases.training),
        validation_scans=len(cases.validation),
        lesions=count_lesions(cases.training),
        left_out=cases.left_out,
        refused=cases.refused,
        validation_cpm=last.cpm if last else None,
        validation_sensitivity_at_1_fp=last.sensitivity_at_1_fp if last else None,
        proposal_recall=last.proposals[ALL].share if last and last.proposals else None,
        best_step=state.best_step,
        skipped_steps=state.skipped_steps,
        device=device.name,
        transfer=trainer.plan.why,
        was_finished=was_finished,
    )


def check_before_reading(config: TrainConfig) -> None:
    """Refuse before any scan is read a backbone, or weights of it, that cannot be. UsageError."""
    check_backbone(config.model, config.stack.n_slices)
    check_weights(backbone_name(config.model), config.weights)


def _write_run_files(
    run: Path, config: TrainConfig, detector: DetectorConfig, cases: TrainingData
) -> None:
    """Write what describes the run, and clear what a run that never saved may have left."""
    for name in (BEST_WEIGHTS, LAST_WEIGHTS, METRICS_FILE, HARD_NEGATIVES_FILE):
        (run / name).unlink(missing_ok=True)
    atomic_write_text(run / CONFIG_FILE, config.model_dump_json(indent=2) + "\n")
    save_detector_config(run, detector)
    split = {
        "training": [case.case_id for case in cases.training],
        "validation": [case.case_id for case in cases.validation],
        "left_out": dict(cases.left_out),
        "lesions": count_lesions(cases.training),
    }
    atomic_write_text(run / SPLIT_FILE, to_json(split))


def make_trainer(
    config: TrainConfig,
    detector: DetectorConfig,
    cases: TrainingData,
    device: Device,
    *,
    resumed: bool = False,
) -> Trainer:
    """Build the network, its average, the criterion and the optimizer, from the run's seed.

    Pretrained weights are loaded unless the run is ``resumed``: its checkpoint then holds what came of them.
    """
    torch.manual_seed(config.seed)
    network = build_model(detector.model, detector.stack.n_slices, len(detector.class_names))
    counts = count_lesions(cases.training)
    plan = _transfer(network, config, counts, resumed)
    network = network.to(device.torch_device).to(memory_format=torch.channels_last)
    weights = _class_weights(config, detector.class_names, counts)
    groups = parameter_groups(network, plan, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    return Trainer(
        network=network,
        average=copy.deepcopy(network),
        criterion=build_criterion(detector.model, weights).to(device.torch_device),
        optimizer=optimizer,
        device=device,
        config=config,
        plan=plan,
    )


def _transfer(
    network: nn.Module, config: TrainConfig, counts: dict[str, int], resumed: bool
) -> TransferPlan:
    """Load pretrained weights, if the settings name some, and decide what of the network learns."""
    mode, why = choose_transfer(
        config.transfer, counts, config.weights is not None, must_learn=must_learn(config.model)
    )
    encoder = ENCODERS.get(config.model.name, "backbone")
    name = backbone_name(config.model)
    if config.weights is not None and name is not None and not resumed:
        # The validator of the settings lets no other part be given weights.
        part: Any = network.get_submodule(encoder)
        source = load_pretrained(part, name, config.weights)
        why = f"{why} Weights: {source}."
    logger.info("Transfer %s", why)
    return plan_transfer(network, mode, why, encoder=(encoder,), outputs=OUTPUTS[config.model.name])


def _class_weights(
    config: TrainConfig, class_names: Sequence[str], counts: Mapping[str, int]
) -> torch.Tensor:
    """Return the loss weights that the settings name, else the inverse roots of the counts, mean 1.

    The root is half way to equal classes.
    """
    given = config.class_weights
    if given:
        return torch.tensor([given.get(name, 1.0) for name in class_names])
    weights = np.array([max(counts.get(name, 1), 1) for name in class_names]) ** -0.5
    return torch.tensor(weights / weights.mean(), dtype=torch.float32)
