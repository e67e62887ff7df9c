"""The records of an examination of the machine: checks, in sections, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "failed"]


@dataclass(frozen=True)
class Check:
    """One finding about the machine.

    ``status`` is ``ok``; ``note`` for what is worth knowing but stops nothing; or ``failed`` for
    what medvision needs and does not get. ``remedy`` says what to do about the latter two.
    """

    name: str
    status: Status
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class Section:
    """A heading and the checks under it."""

    title: str
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Diagnosis:
    """All sections; ``ok`` unless a check failed."""

    sections: tuple[Section, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed, in order."""
        checks = (check for section in self.sections for check in section.checks)
        return tuple(check for check in checks if check.status == "failed")

    @property
    def ok(self) -> bool:
        """Tell whether nothing failed."""
        return not self.failures
