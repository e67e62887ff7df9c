"""One DICOM series of those that were found, by what a user calls it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medvision.errors import InputError
from medvision.scans.instance import read_instance
from medvision.scans.load import ScanReference


def choose_series(
    references: Sequence[ScanReference], series: str | int | None, inputs: Path
) -> list[ScanReference]:
    """Keep the DICOM series of this UID, number or description, all scans for None.

    InputError, with what there is under ``inputs``, if none is left.
    """
    if series is None:
        return list(references)
    wanted = str(series).strip()
    chosen = [one for one in references if _is_series(one, wanted)]
    if not chosen:
        known = [f"{one.case_id} {one.description!r}" for one in references[:10]]
        raise InputError(
            f"No series has the UID, number or description {wanted!r}.",
            where=inputs,
            why=f"found {'; '.join(known)}",
            do="Give one of these UIDs or descriptions.",
        )
    return chosen


def _is_series(reference: ScanReference, wanted: str) -> bool:
    if wanted in (reference.case_id, reference.series_instance_uid):
        return True
    if reference.description and reference.description.casefold() == wanted.casefold():
        return True
    if reference.kind != "dicom" or not wanted.isdigit():
        return False
    return str(read_instance(reference.files[0]).series_number) == wanted
