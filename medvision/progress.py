"""How long work tells its caller how far it is and asks whether to stop; the library never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report: ``done`` of ``total`` ``unit``s of ``stage``; ``note`` is a short live remark.

    ``seconds_left`` is the most that the stage may still take, where a limit says so.
    """

    stage: str
    done: int
    total: int
    unit: str
    note: str = ""
    seconds_left: float | None = None


ProgressCallback = Callable[[Progress], None]
StopCallback = Callable[[], "int | None"]
"""Returns the number of the signal that asks to stop, or None to go on."""


def ignore_progress(progress: Progress) -> None:
    """Drop the report: the default callback."""


def never_stop() -> int | None:
    """Go on: the default stop callback."""
    return None
