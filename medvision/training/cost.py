"""What a training run would cost in time and memory, measured by a few real steps and slices."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from time import monotonic

import numpy as np
import torch

from medvision.detector import DetectorConfig
from medvision.device import Device
from medvision.errors import Interrupted
from medvision.geometry import Box
from medvision.models.two_stage_config import TwoStageConfig
from medvision.predict import find_lesions
from medvision.progress import Progress, ProgressCallback, StopCallback
from medvision.training.cache import CachedCase
from medvision.training.config import TrainConfig
from medvision.training.crops import training_crops
from medvision.training.hard_negatives import slices_apart
from medvision.training.loop import Trainer, batches
from medvision.training.prepare import TrainingData

STEPS = 4
"""Real steps that are taken; the first, which allocates, is not counted."""

_BYTES_IN_MIB = 1 << 20


@dataclass(frozen=True)
class Cost:
    """Time and memory, measured on a few real steps and slices.

    ``seconds_looking`` is for validations and hard negatives. ``memory_mib`` is the most that this
    process, or the GPU, has held so far. ``steps_in_time`` is how many steps fit into ``max_minutes``.
    """

    seconds_preparing: float
    seconds_per_step: float
    seconds_per_slice: float
    seconds_looking: float
    seconds_in_all: float
    steps_in_time: int
    memory_mib: float


def measure_cost(
    trainer: Trainer,
    detector: DetectorConfig,
    cases: TrainingData,
    prepared: float,
    on_progress: ProgressCallback,
    should_stop: StopCallback,
) -> Cost:
    """Take a few steps and look at a few held-out slices; return what a run would take by that."""
    config = trainer.config
    per_step = _time_steps(trainer, detector, cases, on_progress, should_stop)
    per_slice = _time_slices(trainer, detector, (cases.validation or cases.training)[0])
    looking = per_slice * slices_looked_at(config, cases)
    training = config.steps * per_step
    limit = config.max_minutes * 60
    in_time = config.steps
    if limit and training + looking > limit:
        in_time = int(max(0.0, limit - looking) / per_step)
        training = in_time * per_step
    return Cost(
        seconds_preparing=prepared,
        seconds_per_step=per_step,
        seconds_per_slice=per_slice,
        seconds_looking=looking,
        seconds_in_all=prepared + training + looking,
        steps_in_time=in_time,
        memory_mib=_memory_mib(trainer.device),
    )


def slices_looked_at(config: TrainConfig, cases: TrainingData) -> int:
    """Return how many slices a run predicts: all held out at each validation, some for hard negatives.

    A two-stage model is asked once more on slices with lesions, for what it proposes there.
    """
    held_out = sum(len(case.array) for case in cases.validation)
    proposed = 0
    if isinstance(config.model, TwoStageConfig):
        found = (
            (case.case_id, item.slice_index)
            for case in cases.validation
            for item in case.slice_boxes()
        )
        proposed = (config.validations + 1) * len(set(found))
    mined = 0
    if config.sampling.hard_share:
        for case in cases.training:
            every = slices_apart(config.model, config.stack, case.volume.spacing_mm[0])
            mined += -(-len(case.array) // every)
    # At the end the best weights are judged as prediction uses them.
    return round((config.validations + config.predict.looks) * held_out) + proposed + mined


def _time_steps(
    trainer: Trainer,
    detector: DetectorConfig,
    cases: TrainingData,
    on_progress: ProgressCallback,
    should_stop: StopCallback,
) -> float:
    """Return the median seconds of a step with its batch, of those after the first."""
    config = trainer.config.model_copy(update={"steps": min(STEPS, trainer.config.steps)})
    dataset = training_crops(cases.training, detector, config)
    times = [monotonic()]
    for number, (images, targets, _) in enumerate(batches(dataset, config, 0), start=1):
        # Past the warm-up, where all that learns takes part.
        trainer.step(images, targets, max(trainer.plan.warmup_share, 0.5), number)
        _wait(trainer.device)
        times.append(monotonic())
        on_progress(Progress("try steps", number, config.steps, "steps"))
        _stop_if_asked(should_stop)
    spans = np.diff(times)
    return float(np.median(spans[1:] if len(spans) > 1 else spans))


def _time_slices(trainer: Trainer, detector: DetectorConfig, case: CachedCase) -> float:
    """Return the seconds that validation takes for a slice, from the middle slices of a scan."""
    plain = detector.predict.plain()
    slices, rows, columns = case.array.shape
    count = min(slices, plain.batch_size)
    first = (slices - count) // 2
    volume = case.volume.crop(Box(first, 0, 0, first + count, rows, columns))
    started = monotonic()
    find_lesions(
        volume,
        trainer.average,
        detector.model_copy(update={"predict": plain}),
        trainer.device,
    )
    _wait(trainer.device)
    return (monotonic() - started) / count


def _wait(device: Device) -> None:
    """Wait until a GPU has done what it was given: the call itself returns at once."""
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize(device.torch_device)


def _memory_mib(device: Device) -> float:
    if device.torch_device.type == "cuda":
        return torch.cuda.max_memory_allocated(device.torch_device) / _BYTES_IN_MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    per_mib = _BYTES_IN_MIB if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return peak / per_mib


def _stop_if_asked(should_stop: StopCallback) -> None:
    number = should_stop()
    if number is not None:
        raise Interrupted("The dry run was stopped; nothing was kept.", signal_number=number)
