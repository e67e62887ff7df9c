"""Progress lines, signals and summaries, with a clock that the test turns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from medvision.cli.console import (
    LiveProgress,
    Pace,
    PlainProgress,
    as_json,
    format_rate,
    format_seconds,
    is_live,
    print_json,
    print_summary,
    stop_on_signals,
)
from medvision.cli.session import LOG_NAME, Session
from medvision.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_first_last_and_every_five_seconds() -> None:
    clock, lines = Clock(), []
    show = PlainProgress(lines.append, clock)
    for step in range(0, 31):
        show(Progress("train", step, 30, "steps", f"loss {1 - step / 100:.2f}"))
        clock.now += 0.5
    assert lines == [
        "train: 0/30 steps, loss 1.00",
        "train: 10/30 steps, 2.0/s, ETA 0:10, loss 0.90",
        "train: 20/30 steps, 2.0/s, ETA 0:05, loss 0.80",
        "train: 30/30 steps, 2.0/s, loss 0.70",
    ]


def test_alternating_stages_do_not_flood() -> None:
    clock, lines = Clock(), []
    show = PlainProgress(lines.append, clock)
    for scan in range(50):
        show(Progress("scans", scan, 50, "scans"))
        for part in (0, 1, 2):
            show(Progress("read", part, 2, "slices"))
        clock.now += 0.01
    show(Progress("scans", 50, 50, "scans"))
    assert [line.split(",")[0] for line in lines] == [
        "scans: 0/50 scans",
        "read: 0/2 slices",
        "read: 2/2 slices",
        "scans: 50/50 scans",
    ]


def test_rate_is_that_of_the_last_minute() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.update(0)
    assert pace.per_second is None
    assert pace.seconds_left(0, 10) is None
    clock.now += 100
    pace.update(1)
    for done in range(2, 202):
        clock.now += 0.5
        pace.update(done)
    assert pace.per_second == pytest.approx(2.0)
    assert pace.seconds_left(201, 301) == pytest.approx(50)


def test_a_stage_that_starts_over_is_measured_anew() -> None:
    clock, lines = Clock(), []
    show = PlainProgress(lines.append, clock, interval_s=0)
    for _ in range(2):
        for done in (0, 4):
            show(Progress("read", done, 8, "slices"))
            clock.now += 2
    assert lines[3] == "read: 4/8 slices, 2.0/s, ETA 0:02"


def test_unknown_total() -> None:
    lines: list[str] = []
    PlainProgress(lines.append, Clock())(Progress("find scans", 3, 0, "scans"))
    assert lines == ["find scans: 3 scans"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (414, "6:54"), (7389, "2:03:09")]
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(2.94, "2.9/s"), (0.5, "30.0/min"), (0.01, "1:40 per scan")]
)
def test_format_rate(rate: float, text: str) -> None:
    assert format_rate(rate, "scans") == text


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_live_only_on_a_terminal_without_no_color_and_ci() -> None:
    assert is_live(Terminal(), {})
    assert not is_live(StringIO(), {})
    for variable in ("NO_COLOR", "CI"):
        assert not is_live(Terminal(), {variable: "1"})
    assert not is_live(Terminal(), {"TERM": "dumb"})


def test_live_line_shows_done_total_rate_eta_and_note() -> None:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TextColumn

    clock, terminal = Clock(), Terminal()
    column = TextColumn("{task.description} {task.fields[text]}", markup=False)
    console = Console(file=terminal, width=100)
    with RichProgress(column, console=console, auto_refresh=False) as display:
        show = LiveProgress(display, clock)
        show(Progress("train", 0, 30, "steps"))
        clock.now += 5
        show(Progress("train", 10, 30, "steps", "loss [0.4]"))
        assert len(display.tasks) == 1
        assert display.tasks[0].completed == 10
        display.refresh()
    assert "train 10/30 steps, 2.0/s, ETA 0:10, loss [0.4]" in terminal.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_first_signal_asks_to_stop(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as should_stop:
        assert should_stop() is None
        os.kill(os.getpid(), number)
        time.sleep(0)
        assert should_stop() == number
    assert signal.getsignal(number) is before
    assert "Stopping" in capsys.readouterr().err


def test_second_interrupt_ends_at_once() -> None:
    with stop_on_signals() as should_stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert should_stop() == signal.SIGINT


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_code_of_an_interrupted_command(number: signal.Signals, code: int) -> None:
    program = (
        "import os, sys, time\n"
        "import medvision.doctor\n"
        "from medvision.cli.main import main\n"
        "from medvision.errors import Interrupted\n"
        "from medvision.cli.session import Session\n"
        "def work(*args, **kwargs):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    raise Interrupted('Stopped.', signal_number=" + str(int(number)) + ")\n"
        "medvision.doctor.diagnose = work\n"
        "sys.exit(main(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    assert "Error: Stopped." in done.stderr


@dataclass(frozen=True)
class Record:
    path: Path
    score: float
    counts: dict[str, int]
    items: tuple[np.float32, ...]


def test_json_of_records_paths_and_numpy(capsys: pytest.CaptureFixture[str]) -> None:
    record = Record(Path("a/b"), float("nan"), {"x": 1}, (np.float32(0.5),))
    print_json({"record": record, "array": np.eye(2), "set": {1}})
    assert json.loads(capsys.readouterr().out) == {
        "record": {"path": "a/b", "score": None, "counts": {"x": 1}, "items": [0.5]},
        "array": [[1.0, 0.0], [0.0, 1.0]],
        "set": [1],
    }
    assert as_json(True) is True


def test_summary_is_aligned_and_leaves_out_what_is_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_summary("Trained", {"steps": 3, "log": None, "output": Path("runs/a")})
    assert capsys.readouterr().out == "Trained\n  steps   3\n  output  runs/a\n"


def test_finish_says_seconds_and_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(["train"])
    assert session.finish("Trained", {"steps": 3, "next": "medvision predict"}, {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Trained"
    assert lines[-2].split()[0] == "seconds"
    assert lines[-1].split(maxsplit=1) == ["next", "medvision predict"]


def test_json_goes_to_stdout_and_progress_to_stderr(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    session = Session(["train", "--json"])
    session.log_in(tmp_path)
    with session.work() as (on_progress, _):
        on_progress(Progress("train", 1, 1, "steps"))
    assert session.finish("Trained", {}, {"run": tmp_path}, exit_code=4) == 4
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert document["run"] == str(tmp_path)
    assert document["exit_code"] == 4
    assert output.err == "train: 1/1 steps\n"
    log = (tmp_path / LOG_NAME).read_text()
    assert "medvision train --json" in log
    assert "train: 1/1 steps" in log


def test_quiet_shows_no_progress_but_logs_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    session = Session(["train", "--quiet"])
    session.log_in(tmp_path)
    with session.work() as (on_progress, _):
        on_progress(Progress("train", 1, 1, "steps"))
    assert capsys.readouterr() == ("", "")
    assert "train: 1/1 steps" in (tmp_path / LOG_NAME).read_text()


def test_log_waits_for_its_folder_and_does_not_make_it(tmp_path: Path) -> None:
    session = Session(["train"])
    session.log_in(tmp_path / "run")
    session.log("early")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    session.log("late")
    text = (tmp_path / "run" / LOG_NAME).read_text()
    assert text.index("early") < text.index("late")


def test_texts_of_foreign_warnings_stay_out_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    session = Session(["predict"])
    session.log_in(tmp_path)
    with session.work():
        warnings.simplefilter("always")
        warnings.warn("Invalid value for VR PN: 'Doe^Jane'", UserWarning, stacklevel=1)
    text = (tmp_path / LOG_NAME).read_text()
    assert "UserWarning" in text
    assert "Doe" not in text
    assert "Doe" not in capsys.readouterr().err
