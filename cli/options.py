"""Options that several commands share, and the checks that need no more than the file system."""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from medvision.cli.errors import EXIT_CODES
from medvision.errors import InputError, UsageError

_SCAN_ENDINGS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", ".dicom", ".ima")
_SNIFFED_FILES = 200
_FOR_SCANS = "Pass a folder with DICOM files, or a .nii.gz, .mha or .nrrd file."


def known_device(value: str | None) -> str | None:
    """Return the name of a device; typer.BadParameter if there is no such name."""
    if value is not None and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise typer.BadParameter(f"must be auto, cpu, cuda, cuda:N or mps; got {value!r}")
    return value


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout in place of the summary.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, only results and errors.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show an error's traceback, which the log file has anyway."),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        callback=known_device,
        help="Where to compute: auto, which takes a GPU if there is one, cpu, cuda, cuda:N or mps.",
    ),
]


def epilog(*examples: str) -> str:
    """Return the end of a help page: examples and exit codes; ``\\b`` keeps typer from wrapping."""
    heading = "Examples:" if len(examples) > 1 else "Example:"
    codes = [f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items()]
    blocks = ([heading, *(f"  {example}" for example in examples)], ["Exit codes:", *codes])
    return "\n\n".join("\n".join(["\b", *block]) for block in blocks)


def check_exists(path: Path, what: str) -> None:
    """Raise UsageError, with the nearest name there is, unless ``path`` exists."""
    if path.exists():
        return
    parent = path.parent
    names = sorted(os.listdir(parent)) if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    remedy = f"Did you mean {parent / close[0]}?" if close else "Check the spelling."
    raise UsageError(f"{what} does not exist.", where=path, do=remedy)


def check_filled(folder: Path, what: str) -> None:
    """Raise UsageError unless ``folder`` exists and is one, InputError if nothing is in it."""
    check_exists(folder, what)
    if not folder.is_dir():
        raise UsageError(
            f"{what} must be a folder; this is a file.",
            where=folder,
            do=f"Pass the folder that it is in: {folder.parent}",
        )
    if not any(folder.iterdir()):
        raise InputError(f"{what} is empty.", where=folder, do="Check the path.")


def check_run(run: Path) -> None:
    """Raise UsageError unless ``run`` is a folder with files in it, as train writes."""
    check_exists(run, "The run folder")
    if not run.is_dir() or not any(run.iterdir()):
        raise UsageError(
            "A run folder is needed, as medvision train writes it.",
            where=run,
            why="the folder is empty" if run.is_dir() else "this is a file",
            do="Pass the folder that was given to medvision train as -o.",
        )


def check_new_run(run: Path, *, resume: bool) -> None:
    """Raise UsageError if ``run`` holds a run already and it is not to be resumed, or the other way round.

    The library checks the first too, but only after torch, whose import takes seconds. A run that was
    stopped while its scans were prepared has no more than their cache.
    """
    if resume and not any((run / name).exists() for name in ("state.json", "config.json", "cache")):
        check_exists(run, "The run to go on with")
        raise UsageError(
            "There is no run to go on with in this folder.",
            where=run,
            do="Name the folder that was given to medvision train as -o, or leave out --resume.",
        )
    try:
        steps = int(json.loads((run / "state.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if steps and not resume:
        raise UsageError(
            f"The run folder already holds a run of {steps} steps.",
            where=run,
            do="Pass --resume to go on with it, or name another folder.",
        )


def check_holds_scan(path: Path, *, do: str = _FOR_SCANS) -> None:
    """Raise UsageError if ``path`` does not exist, InputError if no scan is in it.

    Names and first bytes of a few files settle most cases; headers are read only if not. ``do`` is
    what to do if there is none.
    """
    check_exists(path, "The input")
    files = [path] if path.is_file() else _files_below(path)
    seen = False
    for position, file in enumerate(files):
        seen = True
        if file.name.lower().endswith(_SCAN_ENDINGS) or _has_dicom_mark(file):
            return
        if position == _SNIFFED_FILES:
            break
    if not seen:
        raise InputError(
            "No scan was found: the folder is empty.",
            where=path,
            do=do,
        )
    from medvision.scans.load import find_scans

    if not len(find_scans(path)):
        raise InputError(
            "No scan was found among the files.",
            where=path,
            why="none of them is a DICOM image, NIfTI, MetaImage or NRRD file",
            do=do,
        )


def check_output_file(file: Path, *, endings: tuple[str, ...]) -> None:
    """Raise UsageError if ``file`` is a folder or its name ends in none of ``endings``."""
    if file.is_dir():
        raise UsageError(
            "The output must be a file; this is a folder.",
            where=file,
            do=f"Name a file in it, such as {file / ('name' + endings[0])}.",
        )
    if file.suffix.lower() not in endings:
        raise UsageError(
            f"The output is a file that ends in {' or '.join(endings)}; got {file.name!r}.",
            where=file,
            do=f"Name it {file.stem}{endings[0]}.",
        )


def check_writable(folder: Path) -> None:
    """Raise UsageError unless files can be written in ``folder``, or the folder can be made.

    Nothing is left behind, so that a command which is refused later has not made the folder.
    """
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".medvision-", dir=there):
            return
    except (PermissionError, NotADirectoryError, FileNotFoundError) as error:
        raise UsageError(
            "The output cannot be written.",
            where=folder,
            why=f"{there}: {error.strerror}",
            do="Choose a folder that you may write to, or change its permissions.",
        ) from error


def _files_below(folder: Path) -> Iterable[Path]:
    for name, folders, files in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        yield from (Path(name, one) for one in sorted(files) if not one.startswith("."))


def _has_dicom_mark(file: Path) -> bool:
    """Tell whether bytes 128 to 131 are DICM (PS3.10 7.1)."""
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False
