"""DICOM files -> series: found by content, grouped, ordered, chosen."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.scans.instance import Instance, read_instance


class Skipped(NamedTuple):
    """A file (or the folder of a series) that was left out, and the reason in a few words."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Series:
    """The slices of one DICOM series in spatial order, at least one."""

    instances: tuple[Instance, ...]

    @property
    def first(self) -> Instance:
        """The first slice; what is the same in the whole series is read from it."""
        return self.instances[0]

    @property
    def series_instance_uid(self) -> str:
        """SeriesInstanceUID."""
        return self.first.series_instance_uid

    @property
    def folder(self) -> Path:
        """The deepest folder that holds every file."""
        return Path(os.path.commonpath([instance.path.parent for instance in self.instances]))

    @property
    def is_volume_like(self) -> bool:
        """Whether every slice says where it lies."""
        return all(instance.is_placed for instance in self.instances)

    @property
    def is_axial_ct(self) -> bool:
        """Whether these are CT slices that lie rather across the body than along it."""
        if self.first.modality != "CT" or not self.is_volume_like:
            return False
        return int(np.abs(self.first.normal).argmax()) == 2

    @property
    def n_voxels(self) -> int:
        """Slices x rows x columns."""
        return len(self.instances) * self.first.rows * self.first.columns

    def describe(self) -> str:
        """Return number, description, modality, slices and UID on one line."""
        first = self.first
        name = f"series {first.series_number or '?'} {first.series_description!r}"
        return (
            f"{name}: {first.modality}, {len(self.instances)} slices, {first.series_instance_uid}"
        )


def find_instances(files: Iterable[Path]) -> tuple[list[Instance], list[Skipped]]:
    """Read the header of every file; what is unreadable or no DICOM is skipped, with its reason."""
    instances, skipped = [], []
    for path in files:
        try:
            instances.append(read_instance(path))
        except InputError as error:
            skipped.append(Skipped(path, error.what))
    return instances, skipped


def group_series(instances: Iterable[Instance]) -> tuple[list[Series], list[Skipped]]:
    """Group slices by SeriesInstanceUID; localizers, reports and the like are left out."""
    slices: defaultdict[str, list[Instance]] = defaultdict(list)
    others: Counter[tuple[Path, str, str]] = Counter()
    for instance in instances:
        reason = instance.why_no_slice
        if reason is None:
            slices[instance.series_instance_uid].append(instance)
        else:
            name = f"series {instance.series_number or '?'} {instance.series_description!r}"
            others[instance.path.parent, name, reason] += 1
    skipped = [
        Skipped(folder, f"{name}: {count} x {reason}")
        for (folder, name, reason), count in others.items()
    ]
    return [Series(order_instances(group)) for group in slices.values()], skipped


def order_instances(instances: Iterable[Instance]) -> tuple[Instance, ...]:
    """Order slices along their normal, lowest first (PS3.3 C.7.6.2.1.1); never by number.

    Names only break ties and order slices of which one does not say where it lies.
    """
    by_name = sorted(instances, key=lambda instance: str(instance.path))
    if not all(instance.is_placed for instance in by_name):
        return tuple(by_name)
    normal = by_name[0].normal
    return tuple(sorted(by_name, key=lambda instance: float(_position(instance) @ normal)))


def choose_series(
    found: Sequence[Series], wanted: str | int | None, where: Path
) -> tuple[Series, tuple[str, ...]]:
    """Return the series to read and notes on the choice.

    ``wanted`` is a SeriesInstanceUID, a SeriesNumber or a SeriesDescription. Without it the only
    series that can be a volume is taken, else the axial CT with most voxels if there is just one
    such and all series are of one patient. Raises InputError, listing the series, otherwise.
    """
    if wanted is not None:
        matches = list(_matching(found, str(wanted)))
        if len(matches) == 1:
            return matches[0], ()
        raise _undecided(found, f"{len(matches)} series match {str(wanted)!r}", where)
    candidates = [series for series in found if series.is_volume_like] or list(found)
    if len(candidates) == 1:
        return candidates[0], _note_on_choice(candidates[0], found)
    return _largest_axial_ct(candidates, found, where)


def _largest_axial_ct(
    candidates: list[Series], found: Sequence[Series], where: Path
) -> tuple[Series, tuple[str, ...]]:
    if len({series.first.patient_id for series in candidates}) > 1:
        raise _undecided(candidates, "The series are of more than one patient", where)
    axial = sorted(
        (series for series in candidates if series.is_axial_ct), key=lambda series: -series.n_voxels
    )
    if not axial:
        raise _undecided(candidates, f"{len(candidates)} series could be meant", where)
    if len(axial) > 1 and axial[0].n_voxels == axial[1].n_voxels:
        raise _undecided(candidates, "Several axial CT series are the largest", where)
    return axial[0], _note_on_choice(axial[0], found)


def _note_on_choice(chosen: Series, found: Sequence[Series]) -> tuple[str, ...]:
    others = [series.describe() for series in found if series is not chosen]
    if not others:
        return ()
    return (f"Read {chosen.describe()}; left aside {'; '.join(others)}.",)


def _matching(found: Sequence[Series], wanted: str) -> Iterator[Series]:
    for name in ("series_instance_uid", "series_number", "series_description"):
        matches = [
            series
            for series in found
            if getattr(series.first, name).strip().casefold() == wanted.strip().casefold()
        ]
        if matches:
            yield from matches
            return


def _undecided(found: Sequence[Series], problem: str, where: Path) -> InputError:
    listing = "\n    ".join(series.describe() for series in found)
    return InputError(
        f"One series must be chosen. {problem}.",
        where=where,
        why=f"found\n    {listing}" if found else "found no series",
        do="name one by its UID, number or description (series=...).",
    )


def _position(instance: Instance) -> NDArray[np.float64]:
    return np.array(instance.image_position, dtype=float)
