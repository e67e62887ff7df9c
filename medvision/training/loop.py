"""The training step and the loop around it: forward, loss, backward, step, in plain sight."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from medvision.device import Device
from medvision.errors import MedvisionError
from medvision.models.criterion import Target
from medvision.models.family import forward_training
from medvision.training.config import TrainConfig
from medvision.training.samples import Sample, collate
from medvision.training.transfer import TransferPlan, set_training

MOST_SKIPPED_IN_A_ROW = 20


@dataclass
class Trainer:
    """The parts of a run that change at every step, and how they do."""

    network: nn.Module
    average: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    device: Device
    config: TrainConfig
    plan: TransferPlan

    def step(
        self, images: Tensor, targets: list[Target], progress: float, number: int
    ) -> dict[str, float] | None:
        """Train on one batch at ``progress`` (0..1) of the run, step ``number`` of it; return the losses.

        Returns None, and leaves all weights and statistics as they are, if the loss or its gradient is
        not finite.
        """
        # Dropout draws from torch's own generator: seeded by the step, a resumed run draws the same.
        torch.manual_seed(self.config.seed * self.config.steps + number)
        set_training(self.network, self.plan, progress)
        factor = rate_factor(progress, self.config.warmup_share)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor * group["rate"]
        images = images.to(self.device.torch_device, memory_format=torch.channels_last)
        statistics = [value.clone() for value in self.network.buffers()]
        on_device = [_to_device(target, self.device.torch_device) for target in targets]
        with self.device.autocast():
            raw = forward_training(self.network, images, on_device)
        losses = self.criterion(raw, on_device)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip)
        if not (torch.isfinite(total) and torch.isfinite(norm)):
            self._restore(statistics)
            return None
        self.optimizer.step()
        update_average(self.average, self.network, self.config.average_share, number)
        return {"loss": total.item(), **{name: value.item() for name, value in losses.items()}}

    @torch.no_grad()
    def _restore(self, statistics: list[Tensor]) -> None:
        """Put batch norm's statistics back: one bad batch would otherwise stay in them as NaN."""
        for value, before in zip(self.network.buffers(), statistics, strict=True):
            value.copy_(before)


def rate_factor(progress: float, warmup_share: float) -> float:
    """Return the share of the highest rate at ``progress`` 0..1: linear up, then half a cosine down."""
    if progress < warmup_share:
        return (progress + 1e-3) / warmup_share
    rest = (progress - warmup_share) / (1 - warmup_share)
    return 0.5 * (1 + math.cos(math.pi * min(rest, 1.0))) + 1e-3


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, share: float, number: int) -> None:
    """Move the averaged weights towards the network's after step ``number`` (from 0).

    The mean decays over ``share`` of the steps so far, so that it means the same in a run of any length; from
    the first step on it holds nothing of the random start. A longer mean is less sure of single structures
    that no training scan shows (Izmailov et al., Averaging Weights Leads to Wider Optima, UAI 2018).
    """
    decay = 1 - 1 / (1 + share * number)
    live = network.state_dict()
    for name, value in average.state_dict().items():
        if value.dtype.is_floating_point:
            value.lerp_(live[name], 1 - decay)
        else:
            value.copy_(live[name])


def _to_device(target: Target, device: torch.device) -> Target:
    return {name: value.to(device) for name, value in target.items()}  # type: ignore[return-value,attr-defined]


def batches(
    dataset: Dataset[Sample], config: TrainConfig, first_step: int
) -> Iterator[tuple[Tensor, list[Target], list[str]]]:
    """Yield the batches of steps ``first_step``..``config.steps``; the same ones however often resumed."""
    order = range(first_step * config.batch_size, config.steps * config.batch_size)
    return iter(
        DataLoader(
            dataset,
            batch_size=config.batch_size,
            sampler=order,
            num_workers=config.workers,
            collate_fn=collate,
            persistent_workers=config.workers > 0,
        )
    )


class Clock:
    """How far a run is: by steps, or by minutes where those end first."""

    def __init__(self, config: TrainConfig, seconds: float, now: Callable[[], float]) -> None:
        """Go on from ``seconds`` of training done; ``now`` is a monotonic clock in seconds."""
        self.steps = config.steps
        self.limit = config.max_minutes * 60
        self.reserved = 0.0  # seconds kept for what comes after the last step
        self._now = now
        self._start = now() - seconds

    @property
    def seconds(self) -> float:
        """Seconds trained, over all sessions of the run."""
        return self._now() - self._start

    @property
    def seconds_left(self) -> float | None:
        """Seconds that training may still take, without what comes after it; None without a limit."""
        return max(0.0, self.limit - self.reserved - self.seconds) if self.limit else None

    def progress(self, step: int) -> float:
        """Return 0..1. With steps left when the minutes end, the learning rate still comes down.

        The minutes count only where the pace so far says that they end the run, so that a run that
        they never end depends on its seed alone.
        """
        by_steps = step / self.steps
        if not self.limit or step < 20:
            return by_steps
        # Expected share of the steps that fit into the limit, judged by the pace so far.
        limit = max(self.limit - self.reserved, 1e-9)
        reachable = limit / max(self.seconds / step, 1e-9)
        if reachable >= self.steps:
            return by_steps
        return min(1.0, max(by_steps, self.seconds / limit))


class SkipGuard:
    """Stops a run whose losses stay not finite, and remembers which cases were in those batches."""

    def __init__(self) -> None:
        self.skipped = 0
        self._in_a_row = 0
        self._cases: deque[str] = deque(maxlen=8)

    def note(self, finite: bool, cases: list[str]) -> None:
        """Count a step; MedvisionError after 20 skipped ones in a row."""
        if finite:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        self._cases.extend(cases)
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise MedvisionError(
                f"The loss was not a finite number in {MOST_SKIPPED_IN_A_ROW} steps in a row.",
                where=f"batches with {', '.join(sorted(set(self._cases)))}",
                why="A learning rate too high, or values in these scans that are not plausible.",
                do="Lower --set learning_rate, or look at these scans with medvision predict.",
            )


def monotonic() -> float:
    """Return the clock that runs are timed with, in seconds."""
    return time.monotonic()
