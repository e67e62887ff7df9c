"""What the terminal sees while a command works: progress, signals, and the summary at the end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from medvision.progress import Progress, ProgressCallback, StopCallback

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL_S = 5.0
"""Seconds between two plain lines of progress."""

LOG_INTERVAL_S = 30.0
"""Seconds between two lines of progress in the log file."""

RATE_WINDOW_S = 60.0
"""The rate is that of the last so many seconds, so that a slow start does not spoil the ETA."""

Clock = Callable[[], float]


class Pace:
    """The rate of one stage, and from it the time that is left."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, done: int) -> None:
        """Note that ``done`` units are done now."""
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_WINDOW_S:
            self._seen.popleft()

    @property
    def per_second(self) -> float | None:
        """Units per second; None as long as nothing has moved."""
        if not self._seen:
            return None
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    def seconds_left(self, done: int, total: int) -> float | None:
        """Seconds until ``total``; None if the rate is not known yet."""
        rate = self.per_second
        return None if rate is None else max(0, total - done) / rate


def format_seconds(seconds: float) -> str:
    """Write a duration as 0:07, 6:54 or 2:03:09."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def format_rate(per_second: float, unit: str) -> str:
    """Write a rate so that the number stays readable: 2.9/s, 12.0/min, or seconds for each unit."""
    if per_second >= 1:
        return f"{per_second:.1f}/s"
    if per_second * 60 >= 1:
        return f"{per_second * 60:.1f}/min"
    return f"{format_seconds(1 / per_second)} per {unit.rstrip('s')}"


def seconds_left(progress: Progress, pace: Pace) -> float | None:
    """Return the seconds that a stage still takes by its pace, or by its limit where that ends first."""
    if not progress.total:
        return None
    known = (pace.seconds_left(progress.done, progress.total), progress.seconds_left)
    return min((left for left in known if left is not None), default=None)


def plain_line(progress: Progress, pace: Pace) -> str:
    """Return one line: ``train: 300/1500 steps, 2.9/s, ETA 6:54, loss 0.41``."""
    total = f"/{progress.total}" if progress.total else ""
    parts = [f"{progress.stage}: {progress.done}{total} {progress.unit}"]
    if pace.per_second is not None:
        parts.append(format_rate(pace.per_second, progress.unit))
    left = seconds_left(progress, pace)
    if left:
        parts.append(f"ETA {format_seconds(left)}")
    if progress.note:
        parts.append(progress.note)
    return ", ".join(parts)


class Stages:
    """The pace of each stage; stages may alternate, and one that starts over is measured anew."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._paces: dict[str, tuple[Pace, int]] = {}

    def update(self, progress: Progress) -> Pace:
        """Take one report and return the pace of its stage."""
        pace, before = self._paces.get(progress.stage, (Pace(self._clock), 0))
        if progress.done < before:
            pace = Pace(self._clock)
        pace.update(progress.done)
        self._paces[progress.stage] = pace, progress.done
        return pace


class PlainProgress:
    """Write the first line of each stage, its last, and in all one every few seconds.

    Of a stage that comes again for every scan only the first run is written in this way.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        clock: Clock = time.monotonic,
        interval_s: float = PLAIN_INTERVAL_S,
    ) -> None:
        self._write = write
        self._clock = clock
        self._interval_s = interval_s
        self._stages = Stages(clock)
        self._marked: set[tuple[str, bool]] = set()
        self._last = clock()

    def __call__(self, progress: Progress) -> None:
        """Take one report."""
        pace = self._stages.update(progress)
        ended = 0 < progress.total <= progress.done
        mark = (progress.stage, ended)
        if mark in self._marked and self._clock() - self._last < self._interval_s:
            return
        self._marked.add(mark)
        self._last = self._clock()
        self._write(plain_line(progress, pace))


class LiveProgress:
    """One line for each stage on a terminal, redrawn in place."""

    def __init__(self, display: RichProgress, clock: Clock = time.monotonic) -> None:
        self._display = display
        self._stages = Stages(clock)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, progress: Progress) -> None:
        """Take one report."""
        pace = self._stages.update(progress)
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._display.add_task(progress.stage, text="")
        text = plain_line(progress, pace).removeprefix(f"{progress.stage}: ")
        self._display.update(
            self._tasks[progress.stage],
            completed=progress.done,
            total=progress.total or None,
            text=text,
        )


def is_live(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a line may be redrawn in place: a terminal, and neither NO_COLOR nor CI."""
    if environment.get("NO_COLOR") or environment.get("CI"):
        return False
    return stream.isatty() and environment.get("TERM") != "dumb"


@contextmanager
def show_progress(*, quiet: bool, log: Callable[[str], object]) -> Iterator[ProgressCallback]:
    """Yield the callback that shows progress on stderr in the way that fits it.

    ``log`` gets plain lines in any case.
    """
    to_log = PlainProgress(log, interval_s=LOG_INTERVAL_S)
    if quiet:
        yield to_log
    elif not is_live(sys.stderr):
        yield _both(PlainProgress(_print_to_stderr), to_log)
    else:
        with _live_display() as display:
            yield _both(LiveProgress(display), to_log)


def _both(first: ProgressCallback, second: ProgressCallback) -> ProgressCallback:
    def show(progress: Progress) -> None:
        first(progress)
        second(progress)

    return show


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _live_display() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    return RichProgress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=10)),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
    )


@contextmanager
def stop_on_signals() -> Iterator[StopCallback]:
    """Yield a callback that tells which signal asked to stop, if any.

    The first SIGINT, SIGTERM or SIGUSR1 (which a cluster sends before it ends a job) only sets the
    answer, so that the work can save itself; a second SIGINT raises KeyboardInterrupt at once.
    """
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        print("\nStopping after the current step; Ctrl-C once more ends now.", file=sys.stderr)

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, handle) for number in watched}
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_json(value: object) -> Any:
    """Turn records, paths, NumPy scalars and arrays into what ``json`` can write."""
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if hasattr(value, "model_dump"):
        return as_json(value.model_dump())
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def print_json(document: Mapping[str, object]) -> None:
    """Write one JSON object to stdout; numbers that JSON has not (NaN, infinity) become null."""
    print(json.dumps(_finite(as_json(document)), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def print_summary(title: str, facts: Mapping[str, object]) -> None:
    """Write a summary to stdout: a title, then one aligned line for each fact that is not None."""
    print(title)
    known = {name: value for name, value in facts.items() if value is not None}
    width = max((len(name) for name in known), default=0)
    for name, value in known.items():
        text = str(value) if not isinstance(value, Path) else os.fspath(value)
        print(f"  {name:<{width}}  {text}")
