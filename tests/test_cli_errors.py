"""Errors: the exit code, six lines at most that say what to do, the log, and what comes early."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medvision.cli import main as cli_main
from medvision.cli.errors import MAX_LINES, as_medvision_error, complain_of, render
from medvision.cli.main import main
from medvision.cli.options import check_holds_scan, check_writable
from medvision.cli.settings import merge_settings, parse_settings, resolve_config
from medvision.errors import (
    InputError,
    Interrupted,
    MedvisionError,
    PartialError,
    ResourceError,
    UsageError,
)


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's error; torch itself is not wanted here."""


CODES = [
    (UsageError("x"), 2),
    (InputError("x"), 3),
    (PartialError("x"), 4),
    (ResourceError("x"), 5),
    (MemoryError(), 5),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 5),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 5),
    (RuntimeError("Failed to allocate memory for requested buffer of size 9"), 5),
    (OSError(errno.ENOSPC, "No space left on device", "/out/a"), 5),
    (PermissionError(errno.EACCES, "Permission denied", "/out/a"), 2),
    (Interrupted("x"), 130),
    (Interrupted("x", signal_number=15), 143),
    (KeyboardInterrupt(), 130),
    (ValueError("never foreseen"), 1),
    (KeyError(), 1),
]


@pytest.fixture
def failing_doctor(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Make ``medvision doctor`` raise what the returned list holds."""
    errors: list[BaseException] = []

    def diagnose(*args: object, **kwargs: object) -> None:
        raise errors[0]

    monkeypatch.setattr("medvision.doctor.diagnose", diagnose)
    return errors


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: repr(value)[:40])
def test_exit_codes(
    error: BaseException,
    code: int,
    failing_doctor: list[BaseException],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing_doctor.append(error)
    assert main(["doctor"]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("Error: ")
    assert "Traceback" not in output.err
    assert len(output.err.splitlines()) <= MAX_LINES


def test_a_bug_leaves_its_traceback_in_a_log(
    failing_doctor: list[BaseException],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing_doctor.append(ZeroDivisionError("division by zero"))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().err
    assert "This is a bug in medvision" in printed
    (log,) = tmp_path.glob("medvision-*.log")
    assert str(log) in printed
    assert "Traceback" in log.read_text()
    assert "medvision doctor" in log.read_text()


def test_debug_shows_the_traceback_on_either_side_of_the_command(
    failing_doctor: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_doctor.append(InputError("nothing here"))
    for arguments in (["--debug", "doctor"], ["doctor", "--debug"]):
        assert main(arguments) == 3
        printed = capsys.readouterr().err
        assert "Traceback" in printed
        assert "Error: nothing here" in printed


def test_errors_as_json(
    failing_doctor: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_doctor.append(InputError("no scan", where="a/b", why="empty", do="pass another"))
    assert main(["doctor", "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 3
    assert document["error"]["what"] == "no scan"
    assert document["error"]["where"] == "a/b"
    assert main(["doctor", "--jso", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert "--jso" in document["error"]["what"]


def test_long_errors_stay_within_six_lines_and_keep_the_log() -> None:
    error = MedvisionError("what " * 60, where="where " * 60, why="why " * 60, do="do " * 60)
    text = render(error, log=Path("/tmp/some.log"), color=False, width=60)
    lines = text.splitlines()
    assert len(lines) <= MAX_LINES
    assert all(len(line) <= 60 for line in lines)
    assert lines[-1].split() == ["log:", "/tmp/some.log"]
    assert [line.split()[0] for line in lines if line[2:3] != " "][-3:] == ["why:", "do:", "log:"]


def test_color_only_where_asked() -> None:
    error = InputError("no scan")
    assert "\x1b" not in render(error, log=None, color=False)
    assert render(error, log=None, color=True).startswith("\x1b[1;31mError:\x1b[0m no scan")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tran"], "Did you mean 'train'?"),
        (["train", "d", "-o", "r", "--step", "3"], "--steps"),
        (["train"], "Missing argument 'DATA'"),
        (["train", "d", "-o", "r", "--steps", "many"], "--steps"),
        (["predict", "r", "s", "-o", "o", "--device", "gpu"], "cuda:N"),
        (["predict", "r", "s", "-o", "o", "--score-thresh", "2"], "--score-thresh"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_suggest(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert "--help" in printed


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "case.nii.gz").write_bytes(b"only the name is looked at")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "best.safetensors").touch()
    return folder


def early(tmp_path: Path) -> dict[str, tuple[list[str], int]]:
    empty, text, scans, run = (tmp_path / name for name in ("empty", "text", "scans", "run"))
    below_a_file = text / "note.txt" / "out"
    return {
        "train, no data": (["train", f"{tmp_path}/none", "-o", f"{tmp_path}/r"], 2),
        "train, empty": (["train", f"{empty}", "-o", f"{tmp_path}/r"], 3),
        "train, no scan": (["train", f"{text}", "-o", f"{tmp_path}/r"], 3),
        "train, unwritable": (["train", f"{scans}", "-o", f"{below_a_file}"], 2),
        "train, no such setting": (
            ["train", f"{scans}", "-o", f"{tmp_path}/r", "--set", "stepps=3"],
            2,
        ),
        "predict, no run": (["predict", f"{tmp_path}/none", f"{scans}", "-o", f"{tmp_path}/o"], 2),
        "predict, run is none": (["predict", f"{text}", f"{scans}", "-o", f"{tmp_path}/o"], 2),
        "predict, empty run": (["predict", f"{empty}", f"{scans}", "-o", f"{tmp_path}/o"], 2),
        "predict, no scan": (["predict", f"{run}", f"{empty}", "-o", f"{tmp_path}/o"], 3),
        "predict, unwritable": (["predict", f"{run}", f"{scans}", "-o", f"{below_a_file}"], 2),
        "train, nothing to resume": (
            ["train", f"{scans}", "-o", f"{tmp_path}/none", "--resume"],
            2,
        ),
        "train, resume in another folder": (
            ["train", f"{scans}", "-o", f"{text}", "--resume"],
            2,
        ),
        "report, output is a folder": (
            ["report", f"{text}", "--truth", f"{text}", "-o", f"{empty}"],
            2,
        ),
        "report, output is no page": (
            ["report", f"{text}", "--truth", f"{text}", "-o", f"{tmp_path}/r.json"],
            2,
        ),
        "report, findings are a file": (
            ["report", f"{text}/note.txt", "--truth", f"{text}", "-o", f"{tmp_path}/r.html"],
            2,
        ),
        "export, output of another format": (["export", f"{run}", "-o", f"{tmp_path}/m.pt"], 2),
        "report, no findings": (
            ["report", f"{tmp_path}/none", "--truth", f"{text}", "-o", f"{tmp_path}/r.html"],
            2,
        ),
        "report, empty": (
            ["report", f"{empty}", "--truth", f"{text}", "-o", f"{tmp_path}/r.html"],
            3,
        ),
        "report, unwritable": (
            ["report", f"{text}", "--truth", f"{text}", "-o", f"{below_a_file}/r.html"],
            2,
        ),
        "sample, unwritable": (["sample", f"{below_a_file}"], 2),
    }


def test_refusals_come_before_torch_and_leave_nothing(
    tmp_path: Path, scans: Path, run: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "note.txt").write_text("not a scan")
    before = sorted(tmp_path.rglob("*"))
    cases = early(tmp_path)
    code = (
        "import json, sys\n"
        "from medvision.cli.main import main\n"
        "codes = {name: main(words) for name, (words, _) in json.load(sys.stdin).items()}\n"
        "print(json.dumps([codes, 'torch' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    codes, torch_imported = json.loads(done.stdout)
    assert codes == {name: expected for name, (_, expected) in cases.items()}
    assert not torch_imported
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistyped_path_gets_the_nearest_name(
    scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(scans.with_name("scan")), "-o", str(scans.with_name("r"))]) == 2
    assert f"Did you mean {scans}?" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_unwritable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError):
        check_writable(tmp_path / "out")


def test_check_writable_accepts_a_folder_to_be_made_and_does_not_make_it(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_file_without_ending_but_with_the_dicom_mark_is_a_scan(tmp_path: Path) -> None:
    (tmp_path / "I0001").write_bytes(bytes(128) + b"DICM")
    check_holds_scan(tmp_path)
    (tmp_path / "I0001").write_bytes(bytes(128) + b"DUCK")
    with pytest.raises(InputError):
        check_holds_scan(tmp_path)


def test_settings_are_read_as_yaml_and_unknown_ones_get_the_nearest() -> None:
    known = ["steps", "sampling.crop_size", "window"]
    found = parse_settings(["steps=30", "window=[-1000, 400]", "sampling.crop_size=96"], known)
    assert found == {"steps": 30, "window": [-1000, 400], "sampling.crop_size": 96}
    for pair, hint in (("stpes=3", "steps"), ("crop_size=3", "sampling.crop_size")):
        with pytest.raises(UsageError) as caught:
            parse_settings([pair], known)
        assert caught.value.do == f"Did you mean {hint}?"
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_settings(["steps"], known)


def test_settings_merge_into_the_parts() -> None:
    values = {"steps": 1, "part": {"a": 1, "b": 2}}
    changes = {"steps": 2, "part.a": 3, "part.b": 4}
    assert merge_settings(values, changes) == {"steps": 2, "part": {"a": 3, "b": 4}}
    assert values["part"] == {"a": 1, "b": 2}


def test_options_win_over_set_and_set_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 10\nseed: 11\nbatch_size: 12\n")
    config, _ = resolve_config(file, ["steps=20", "seed=21"], {"steps": 30, "device": None})
    assert (config.steps, config.seed, config.batch_size, config.device) == (30, 21, 12, "auto")
    with pytest.raises(UsageError, match="steps"):
        resolve_config(None, ["steps=none"], {})


def test_long_lists_of_remarks_end_in_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    complain_of("Note", [], "x.json")
    assert capsys.readouterr().err == ""
    complain_of("Note", [f"case {number}" for number in range(12)], "x.json")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Note: case 0"
    assert lines[10:] == ["Note: 2 more, in x.json"]


def test_an_unforeseen_error_keeps_its_type() -> None:
    error = as_medvision_error(ValueError("a\nb"))
    assert error.exit_code == 1
    assert error.why == "ValueError: a"


def test_a_rust_panic_is_reported_like_any_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class PanicException(BaseException):
        pass

    def panic(*args: object, **kwargs: object) -> None:
        raise PanicException("called unwrap on None")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cli_main, "app", panic)
    assert main(["doctor"]) == 1
    assert "PanicException" in capsys.readouterr().err


def test_a_word_that_is_no_choice_is_told_in_plain_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "data", "-o", "run", "--model", "retinane"]) == 2
    said = capsys.readouterr().err
    assert "Invalid value for '--model': 'retinane' is not one of 'retinanet', " in said
    assert "Value error" not in said
