"""How a command fails: what is printed, what the log keeps, and the exit code.

0 done   1 a bug of ours   2 wrong usage   3 input refused   4 partly done
5 out of memory or disk   130 or 143 interrupted, the same command resumes
"""

from __future__ import annotations

import errno
import sys
import textwrap
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medvision.errors import (
    Interrupted,
    MedvisionError,
    ResourceError,
    UsageError,
    first_line,
    ran_out_of_memory,
)

EXIT_CODES = {
    0: "done",
    1: "a bug in medvision",
    2: "wrong usage",
    3: "input refused",
    4: "partly done, the failures are listed",
    5: "out of memory or disk",
    130: "interrupted (143: terminated), resumable",
}
MAX_LINES = 6
_LISTED = 10
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)


class UnforeseenError(MedvisionError):
    """An exception that medvision did not foresee."""

    exit_code = 1


def as_medvision_error(error: BaseException) -> MedvisionError:
    """Translate any exception into one with a sentence, a remedy and an exit code."""
    if isinstance(error, MedvisionError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("Interrupted.", do="Run the same command again.")
    if is_usage_error(error):
        return _usage_error(error)
    if ran_out_of_memory(error):
        return ResourceError(
            "Memory ran out.",
            why=first_line(error),
            do="Close other programs, or lower batch_size or workers (train --set), or use "
            "--device cpu.",
        )
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return ResourceError(
            "The disk is full.",
            where=error.filename,
            why=error.strerror,
            do="Free some space or choose another output folder, then run the same command again.",
        )
    if isinstance(error, PermissionError) and error.filename:
        return UsageError(
            "A file or folder may not be opened.",
            where=error.filename,
            why=error.strerror,
            do="Change its permissions, or choose another path.",
        )
    return UnforeseenError(
        "This is a bug in medvision.",
        why=f"{type(error).__name__}: {first_line(error)}",
        do="Please report it with the log file below.",
    )


def is_usage_error(error: BaseException) -> bool:
    """Tell whether typer refused the command line; its classes are private, so by their shape."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def render(error: MedvisionError, *, log: Path | None, color: bool, width: int = 100) -> str:
    """Return the error as at most six lines: what, where, why, what to do, and the log file."""
    facts = {"where": error.where, "why": error.why, "do": error.do, "log": log}
    lines = _wrap(f"Error: {error.what}", "", width, most=2)
    known = [(name, str(value)) for name, value in facts.items() if value]
    for position, (name, value) in enumerate(known):
        spare = MAX_LINES - len(lines) - (len(known) - position - 1)
        lines += _wrap(f"  {name + ':':<6} {value}", " " * 9, width, most=max(1, spare))
    if color:
        lines[0] = lines[0].replace("Error:", "\x1b[1;31mError:\x1b[0m", 1)
    return "\n".join(lines[:MAX_LINES])


def as_document(error: MedvisionError, log: Path | None) -> dict[str, Any]:
    """Return the error as the JSON object that ``--json`` prints."""
    facts = {"what": error.what, "where": error.where, "why": error.why, "do": error.do}
    return {
        "error": {"type": type(error).__name__, **facts, "log": log and str(log)},
        "exit_code": error.exit_code,
    }


def format_traceback(error: BaseException) -> str:
    """Return the traceback with its causes, without local variables: they may hold patient data."""
    return "".join(traceback.format_exception(error))


def _usage_error(error: Any) -> UsageError:
    context = getattr(error, "ctx", None)
    if context is None:
        return UsageError(_message(error), do="See medvision --help.")
    usage = " ".join(context.get_usage().split()).removeprefix("Usage: ")
    return UsageError(
        _message(error),
        do=f"Call it as {usage}; see {context.command_path} --help.",
    )


def _message(error: Any) -> str:
    # typer puts the kind of exception before what it says of a value that is no choice.
    return str(error.format_message()).replace(": Value error, ", ": ")


def _wrap(text: str, indent: str, width: int, most: int) -> list[str]:
    return textwrap.wrap(
        " ".join([text[: len(text) - len(text.lstrip())] + text.lstrip()]),
        max(width, 40),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        max_lines=most,
        placeholder=" ...",
        drop_whitespace=True,
    )


def complain_of(kind: str, items: Sequence[str], rest_in: str) -> None:
    """Write the first of several remarks of one kind to stderr, and how many more there are and where."""
    more = len(items) - _LISTED
    lines = [f"{kind}: {item}" for item in items[:_LISTED]]
    lines += [f"{kind}: {more} more, in {rest_in}"] if more > 0 else []
    if lines:
        complain(lines)


def complain(lines: Iterable[str]) -> None:
    """Write lines to stderr, and nothing if nobody reads it any more."""
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except (BrokenPipeError, ValueError):
        return
