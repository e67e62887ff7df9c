"""One sitting of a training run: its steps, records, validations and checkpoints."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from medvision.detector import (
    BEST_WEIGHTS,
    DetectorConfig,
    load_weights,
    save_detector_config,
    save_weights,
    with_score_thresh,
)
from medvision.errors import Interrupted
from medvision.files import atomic_write_text
from medvision.progress import Progress, ProgressCallback, StopCallback
from medvision.training.checkpoint import TrainState, save_checkpoint
from medvision.training.config import TrainConfig
from medvision.training.crops import training_crops
from medvision.training.hard_negatives import (
    find_hard_negatives,
    load_hard_negatives,
    save_hard_negatives,
)
from medvision.training.loop import Clock, SkipGuard, Trainer, batches, monotonic
from medvision.training.pictures import write_validation_pictures
from medvision.training.prepare import TrainingData
from medvision.training.samples import CropSampler
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
    _guard: SkipGuard = field(default_factory=SkipGuard)
    _mined: bool = False

    def go(self) -> Validation | None:
        """Train to the end; return what the best weights find in the held-out scans, if there are any."""
        if self.state.finished:
            return None
        _drop_later_records(self.run / METRICS_FILE, self.state.step)
        clock = Clock(self.config, self.state.seconds, monotonic)
        dataset = training_crops(self.cases.training, self.detector, self.config)
        while not self._until_next_look(dataset, clock):
            continue
        # A time limit, or the mining under it, may end a run between two validations.
        if self.cases.validation and self.state.validated_step != self.state.step:
            self._validate(clock)
        result = self._judge_best() if self.cases.validation else None
        self.state.finished = True
        self._save()
        return result

    def _until_next_look(self, dataset: CropSampler, clock: Clock) -> bool:
        """Validate and mine what is due, then train until something is again; True at the end.

        What is due is done before a step and not after it, so that a run stopped in the middle of it
        does it again when resumed, with the same weights.
        """
        state = self.state
        progress = clock.progress(state.step)
        if self._validation_due(progress):
            self._validate(clock)
        if self._mining_due(progress):
            self._mine()
        dataset.show_again(load_hard_negatives(self.run, state.step) or [])
        # For one more validation, and for judging the best weights as prediction uses them.
        clock.reserved = (1 + self.detector.predict.looks) * state.validation_seconds
        progress = clock.progress(state.step)
        if progress >= 1.0:
            return True
        saved = monotonic()
        for images, targets, names in batches(dataset, self.config, state.step):
            losses = self.trainer.step(images, targets, progress, state.step)
            self._guard.note(losses is not None, names)
            state.step += 1
            state.seconds = clock.seconds
            self._tell(losses, clock.seconds_left)
            self._stop_if_asked()
            if monotonic() - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = monotonic()
            progress = clock.progress(state.step)
            if progress >= 1.0:
                return True
            if self._validation_due(progress) or self._mining_due(progress):
                return False
        # Without a next batch all steps are done, whatever the clock says.
        return True

    def _validation_due(self, progress: float) -> bool:
        looks = int(progress * self.config.validations)
        return bool(self.cases.validation) and looks > self.state.validations

    def _mining_due(self, progress: float) -> bool:
        if self._mined or self.config.sampling.hard_share == 0 or progress < MINE_AT:
            return False
        self._mined = load_hard_negatives(self.run, self.state.step) is not None
        return not self._mined

    def _mine(self) -> None:
        trainer = self.trainer
        found = find_hard_negatives(
            trainer.average,
            self.detector,
            self.cases.training,
            trainer.device,
            self._tell_and_stop,
        )
        save_hard_negatives(self.run, self.state.step, found)
        self._record({"kind": "hard negatives", "places": len(found)})

    def _tell(self, losses: dict[str, float] | None, seconds_left: float | None) -> None:
        note = "loss not finite, step skipped" if losses is None else f"loss {losses['loss']:.3f}"
        if self.state.best_score is not None:
            note += f", validation CPM {self.state.best_score:.3f}"
        self.on_progress(
            Progress("train", self.state.step, self.config.steps, "steps", note, seconds_left)
        )
        if losses is not None and self.state.step % LOG_EVERY == 0:
            self._record({"kind": "train", **losses})

    def _record(self, values: dict[str, object]) -> None:
        line = {"step": self.state.step, "seconds": round(self.state.seconds, 1), **values}
        with (self.run / METRICS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")

    def _tell_and_stop(self, progress: Progress) -> None:
        self.on_progress(progress)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        signal_number = self.should_stop()
        if signal_number is None:
            return
        self._save()
        raise Interrupted(
            f"Training was stopped at step {self.state.step} of {self.config.steps}; it is saved.",
            signal_number=signal_number,
            do="Go on with the same command and --resume.",
        )

    def _save(self) -> None:
        self.state.skipped_steps += self._guard.skipped
        self._guard.skipped = 0
        save_checkpoint(
            self.run, self.state, self.trainer.network, self.trainer.average, self.trainer.optimizer
        )

    def _validate(self, clock: Clock) -> None:
        average = self.trainer.average
        started = clock.seconds
        result = validate(
            average, self.detector, self.cases.validation, self.trainer.device, self._tell_and_stop
        )
        self.state.validations += 1
        self.state.validation_seconds = clock.seconds - started
        self.state.validated_step = self.state.step
        self._record_validation("validation", result)
        # Later weights win a tie: they have seen more.
        score = result.cpm if result.cpm is not None else 0.0
        if self.state.best_score is None or score >= self.state.best_score:
            self.state.best_score, self.state.best_step = result.cpm, self.state.step
            save_weights(
                self.run / BEST_WEIGHTS, average.state_dict(), {"step": str(self.state.step)}
            )
            self._write_outcome(result)

    def _judge_best(self) -> Validation:
        """Let the best weights predict the held-out scans as they will be used, mirror images and all.

        This sets the lowest score of a finding: without mirror images the scores are higher.
        """
        network = copy.deepcopy(self.trainer.average)
        network.load_state_dict(load_weights(self.run / BEST_WEIGHTS)[0])
        result = validate(
            network,
            self.detector,
            self.cases.validation,
            self.trainer.device,
            self._tell_and_stop,
            as_predicted=True,
        )
        self._record_validation("held out", result)
        self._write_outcome(result)
        return result

    def _record_validation(self, kind: str, result: Validation) -> None:
        self._record(
            {
                "kind": kind,
                "scans": result.scans,
                "lesions": result.lesions,
                "cpm": result.cpm,
                "sensitivity_at_1_fp": result.sensitivity_at_1_fp,
                "score_thresh": result.score_thresh,
                **_proposal_record(result),
            }
        )

    def _write_outcome(self, result: Validation) -> None:
        """Write what the best weights do on held-out scans: the score threshold and the pictures."""
        detector = with_score_thresh(self.detector, result.score_thresh)
        save_detector_config(self.run, detector)
        write_validation_pictures(
            self.run / PICTURE_FOLDER,
            self.cases.validation,
            result.results,
            detector.predict.score_thresh,
        )


def _proposal_record(result: Validation) -> dict[str, object]:
    """Return the proposal recall of a two-stage model: share and number of boxes, for all and each class."""
    if not result.proposals:
        return {}
    recall = {
        name: {"recall": found.share, "boxes": found.boxes}
        for name, found in result.proposals.items()
    }
    return {"proposals": recall}


def _drop_later_records(path: Path, step: int) -> None:
    """Drop the records of steps after ``step``, which a killed run wrote and this one writes again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        atomic_write_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by the kill
