"""Save and restore a training run, exactly, without pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from medvision.detector import LAST_WEIGHTS, load_weights, save_weights, to_json
from medvision.errors import InputError
from medvision.files import atomic_write_text, sha256_of

STATE_FILE = "state.json"
STATE_WEIGHTS = "state-{slot}.safetensors"


@dataclass
class TrainState:
    """Where a run stands. ``best_score`` is the best validation CPM so far, None before the first.

    ``validations`` counts those done; the last one was at ``validated_step`` and took ``validation_seconds``.
    """

    step: int = 0
    seconds: float = 0.0
    best_score: float | None = None
    best_step: int = 0
    finished: bool = False
    skipped_steps: int = 0
    validations: int = 0
    validated_step: int = -1
    validation_seconds: float = 0.0
    weights_sha256: str = ""
    weights_file: str = ""
    settings_sha256: str = field(default="")


def save_checkpoint(
    run: Path,
    state: TrainState,
    network: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything that a resumed run needs; the last good checkpoint stays until this one is whole.

    Two files are written in turn and state.json, written last, names the one that is good.
    """
    slot = "b" if state.weights_file.endswith("a.safetensors") else "a"
    path = run / STATE_WEIGHTS.format(slot=slot)
    tensors = {
        **{f"network.{name}": value for name, value in network.state_dict().items()},
        **{f"average.{name}": value for name, value in average.state_dict().items()},
        **_optimizer_tensors(optimizer),
    }
    save_weights(path, tensors, {})
    save_weights(run / LAST_WEIGHTS, average.state_dict(), {"step": str(state.step)})
    state.weights_file = path.name
    state.weights_sha256 = sha256_of(path)
    atomic_write_text(run / STATE_FILE, to_json(asdict(state)))


def read_state(run: Path) -> TrainState | None:
    """Return where the run stands, or None if it never saved. InputError if state.json is broken."""
    path = run / STATE_FILE
    if not path.is_file():
        return None
    try:
        return TrainState(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(
            "state.json is not one that medvision wrote.", where=path, why=str(error)
        ) from error


def restore_checkpoint(
    run: Path,
    state: TrainState,
    network: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put the saved tensors back. InputError if the file is damaged: its SHA-256 is checked."""
    path = run / Path(state.weights_file).name
    if not path.is_file() or sha256_of(path) != state.weights_sha256:
        raise InputError(
            "The checkpoint does not match the checksum in state.json.",
            where=path,
            why="The file is missing, was changed or is damaged.",
            do="Restore it, or train into a new folder.",
        )
    tensors, _ = load_weights(path)
    network.load_state_dict(_under(tensors, "network."))
    average.load_state_dict(_under(tensors, "average."))
    _restore_optimizer(optimizer, _under(tensors, "optimizer."))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten AdamW's state: parameter number and name of the moment."""
    return {
        f"optimizer.{number}.{name}": torch.as_tensor(value)
        for number, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
