"""One sitting of a training run: its steps, records, validations and checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from medvision.detector import BEST_WEIGHTS, DetectorConfig, save_weights
from medvision.errors import Interrupted
from medvision.models.retinanet import RetinaNet
from medvision.progress import Progress, ProgressCallback, StopCallback
from medvision.stacks.augment import Augmenter
from medvision.training.checkpoint import TrainState, save_checkpoint
from medvision.training.config import TrainConfig
from medvision.training.hard_negatives import (
    find_hard_negatives,
    load_hard_negatives,
    save_hard_negatives,
)
from medvision.training.loop import Clock, SkipGuard, Trainer, batches, monotonic
from medvision.training.pictures import write_validation_pictures
from medvision.training.prepare import TrainingData
from medvision.training.samples import CropSampler, find_training_lesions
from medvision.training.validate import Validation, validate

METRICS_FILE = "metrics.jsonl"
PICTURE_FOLDER = "validation"
CHECKPOINT_SECONDS = 60.0
LOG_EVERY = 20
MINE_AT = 0.5
"""Share of a run after which hard negatives are looked for."""


@dataclass
class Session:
    """One sitting of a run: from its current step to the end, or to a stop."""

    run: Path
    config: TrainConfig
    detector: DetectorConfig
    cases: TrainingData
    trainer: Trainer
    state: TrainState
    on_progress: ProgressCallback
    should_stop: StopCallback
    _validations: int = 0
    _last: tuple[int, Validation] | None = None

    def go(self) -> Validation | None:
        """Train to the end; return the last validation, if scans were held out."""
        if self.state.finished:
            return None
        clock = Clock(self.config, self.state.seconds, monotonic)
        guard = SkipGuard()
        dataset = self._dataset()
        self._validations = int(clock.progress(self.state.step) * self.config.validations)
        self.trainer.network.train()
        while not self.state.finished:
            self._until_mined(dataset, clock, guard)
        # Mining takes time, and with a time limit may take the run past its last validation.
        if self.cases.validation and (self._last is None or self._last[0] != self.state.step):
            self._validate()
        self._save(guard)
        return self._last[1] if self._last else None

    def _until_mined(self, dataset: CropSampler, clock: Clock, guard: SkipGuard) -> None:
        """Train to the end of the run, or to where hard negatives have been found for the rest."""
        config, state = self.config, self.state
        saved = monotonic()
        progress = clock.progress(state.step)
        found = load_hard_negatives(self.run, state.step)
        dataset.hard_negatives = found or []
        for images, targets, names in batches(dataset, config, state.step):
            losses = self.trainer.step(images, targets, progress)
            guard.note(losses is not None, names)
            state.step += 1
            state.seconds = clock.seconds
            self._tell(losses)
            progress = clock.progress(state.step)
            if int(progress * config.validations) > self._validations and self.cases.validation:
                self._validations = int(progress * config.validations)
                self._validate()
            mine = found is None and config.sampling.hard_share > 0 and progress >= MINE_AT
            if mine:
                self._mine()
            # After these two, so that a run resumed from here has not lost them.
            self._stop_if_asked(guard)
            if monotonic() - saved > CHECKPOINT_SECONDS:
                self._save(guard)
                saved = monotonic()
            if progress >= 1.0 or mine:
                break
        # Without a next batch all steps are done, whatever the clock says.
        state.finished = progress >= 1.0 or state.step >= config.steps

    def _mine(self) -> None:
        trainer = self.trainer
        found = find_hard_negatives(
            _as_retinanet(trainer.average),
            self.detector,
            self.cases.training,
            trainer.device,
            self.on_progress,
        )
        save_hard_negatives(self.run, self.state.step, found)
        self._record({"kind": "hard negatives", "places": len(found)})

    def _dataset(self) -> CropSampler:
        cases = self.cases.training
        return CropSampler(
            cases,
            find_training_lesions(cases, self.detector.class_names),
            self.detector.stack,
            self.config.sampling,
            Augmenter(self.config.augment, self.config.sampling.crop_size),
            self.config.seed,
        )

    def _tell(self, losses: dict[str, float] | None) -> None:
        note = "loss not finite, step skipped" if losses is None else f"loss {losses['loss']:.3f}"
        if self.state.best_score is not None:
            note += f", validation CPM {self.state.best_score:.3f}"
        self.on_progress(Progress("train", self.state.step, self.config.steps, "steps", note))
        if losses is not None and self.state.step % LOG_EVERY == 0:
            self._record({"kind": "train", **losses})

    def _record(self, values: dict[str, object]) -> None:
        line = {"step": self.state.step, "seconds": round(self.state.seconds, 1), **values}
        with (self.run / METRICS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")

    def _stop_if_asked(self, guard: SkipGuard) -> None:
        signal_number = self.should_stop()
        if signal_number is None:
            return
        self._save(guard)
        raise Interrupted(
            f"Training was stopped at step {self.state.step} of {self.config.steps}; it is saved.",
            signal_number=signal_number,
            do="Go on with the same command and --resume.",
        )

    def _save(self, guard: SkipGuard) -> None:
        self.state.skipped_steps += guard.skipped
        guard.skipped = 0
        save_checkpoint(
            self.run, self.state, self.trainer.network, self.trainer.average, self.trainer.optimizer
        )

    def _validate(self) -> None:
        average = _as_retinanet(self.trainer.average)
        result = validate(
            average, self.detector, self.cases.validation, self.trainer.device, self.on_progress
        )
        self._record(
            {
                "kind": "validation",
                "scans": result.scans,
                "lesions": result.lesions,
                "cpm": result.cpm,
                "sensitivity_at_1_fp": result.sensitivity_at_1_fp,
            }
        )
        self._last = (self.state.step, result)
        # Later weights win a tie: they have seen more.
        score = result.cpm if result.cpm is not None else 0.0
        if self.state.best_score is None or score >= self.state.best_score:
            self.state.best_score, self.state.best_step = result.cpm, self.state.step
            save_weights(
                self.run / BEST_WEIGHTS, average.state_dict(), {"step": str(self.state.step)}
            )
            write_validation_pictures(
                self.run / PICTURE_FOLDER, self.cases.validation, result.results
            )


def _as_retinanet(network: nn.Module) -> RetinaNet:
    if not isinstance(network, RetinaNet):
        raise TypeError(f"Expected a RetinaNet; got {type(network).__name__}.")
    return network
