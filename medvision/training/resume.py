"""What a run folder holds already, and whether the run in it is the one that is asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from medvision.errors import InputError, MedvisionError, UsageError
from medvision.training.checkpoint import TrainState, read_state
from medvision.training.config import CONFIG_FILE, TrainConfig, make_train_config, read_settings
from medvision.training.prepare import TrainingData
from medvision.training.settings_help import flat_settings

SPLIT_FILE = "split.json"
_FREE = {"device", "precision", "workers", "max_minutes"}
"""Settings that may change when a run is resumed: where and how fast its weights are computed."""


def open_run(run: Path, config: TrainConfig, resume: bool) -> TrainState:
    """Return the state to go on from; check that it fits what is asked for."""
    found = read_state(run)
    digest = _settings_digest(config)
    if found is None or not (resume or found.step):
        return TrainState(settings_sha256=digest)
    if not resume:
        raise UsageError(
            f"The run folder already holds a run of {found.step} steps.",
            where=run,
            do="Pass --resume to go on with it, or name another folder.",
        )
    if found.settings_sha256 != digest:
        raise UsageError(
            "A run can only be resumed with the settings it was started with.",
            where=run / CONFIG_FILE,
            why=_differing(run, config),
            do="Leave the settings out or repeat them; for others, train into a new folder.",
        )
    return found


def _differing(run: Path, config: TrainConfig) -> str | None:
    """Name up to three settings that the run was not started with."""
    file = run / CONFIG_FILE
    try:
        before = dict(flat_settings(make_train_config(read_settings(file), str(file))))
    except MedvisionError:
        return None
    now = dict(flat_settings(config))
    names = [name for name in now if now[name] != before.get(name) and name not in _FREE]
    told = [f"{name} was {before[name]}, now {now[name]}" for name in names if name in before]
    return "; ".join(told[:3]) + (f"; {len(told) - 3} more" if told[3:] else "") or None


def _settings_digest(config: TrainConfig) -> str:
    """Hash the settings that shape the weights; where and how fast they are computed may change."""
    values = config.model_dump(mode="json", exclude=_FREE)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_same_split(run: Path, cases: TrainingData) -> None:
    """Refuse to go on with other scans: who was held out must stay held out."""
    path = run / SPLIT_FILE
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        before = [set(split["training"]), set(split["validation"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{SPLIT_FILE} is not one that medvision wrote.", where=path, why=str(error)
        ) from error
    now = [{case.case_id for case in side} for side in (cases.training, cases.validation)]
    if before != now:
        changed = sorted((before[0] ^ now[0]) | (before[1] ^ now[1]))
        raise UsageError(
            "A run can only be resumed on the scans it was started with.",
            where=path,
            why=f"{len(changed)} scans are new, gone or on the other side, {changed[0]} first.",
            do="Restore the data, or train into a new folder.",
        )
