"""The errors that medvision raises on purpose; the command line renders these and no others."""

from __future__ import annotations

import re


class MedvisionError(Exception):
    """Say what must hold, what came, where, and what to do about it.

    ``what`` is one sentence; ``where`` names a file, series or option; ``why`` gives the cause where
    it is not plain from ``what``; ``do`` is the next thing to try. Only ``what`` is required.
    ``exit_code`` is the status that the command line ends with.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        why: str | None = None,
        do: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.why = why
        self.do = do

    def __str__(self) -> str:
        """Return at most four lines: what, then where, why and do if they are known."""
        parts = [self.what]
        for name in ("where", "why", "do"):
            value = getattr(self, name)
            if value:
                parts.append(f"  {name}: {value}")
        return "\n".join(parts)


class UsageError(MedvisionError):
    """The command or the call was wrong: a missing path, an unwritable output, an unknown option."""

    exit_code = 2


class InputError(MedvisionError):
    """The input was read and refused: nothing usable is in it."""

    exit_code = 3


class PartialError(MedvisionError):
    """Some of the work was done, some failed; the failures are listed."""

    exit_code = 4


class ResourceError(MedvisionError):
    """Memory or disk ran out."""

    exit_code = 5


class Interrupted(MedvisionError):  # noqa: N818  (not a fault)
    """A signal stopped the work; what was finished is saved and the same command can resume."""

    exit_code = 130

    def __init__(self, what: str, *, signal_number: int = 2, do: str | None = None) -> None:
        super().__init__(what, do=do)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, without colours; its name if it says nothing."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (text or type(error).__name__).splitlines()[0]


_NO_MEMORY = ("can't allocate memory", "failed to allocate memory", "bad_alloc", "bad allocation")
"""What torch on a CPU and ONNX Runtime say: their errors have no class of their own for it."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out: Python's, torch's on a GPU or a CPU, or ONNX Runtime's.

    torch's class is known by its name: importing torch to compare types would take seconds. An error of
    our own is what it says it is: the text of a decoder in it, or a file's name, must not make it another.
    """
    if isinstance(error, MedvisionError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, Exception) and any(words in text for words in _NO_MEMORY)
