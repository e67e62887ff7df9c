"""The folder of one predicted scan: there whole or not at all, and known by what it came from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from medvision.errors import MedvisionError
from medvision.files import PARTIAL, atomic_write_text
from medvision.findings.finding import ScanFindings
from medvision.outputs.images import write_finding_pictures
from medvision.outputs.json_csv import read_findings, write_findings
from medvision.outputs.label_volume import write_finding_labels
from medvision.scans.volume import Volume

SUMMARY_FILE = "summary.json"
SOURCE_FILE = "source.json"

_TAKEN_NAMES = frozenset({"", SUMMARY_FILE, "log.txt"})
_MAX_NAME = 128


def folder_name(case_id: str) -> str:
    """Return ``case_id`` as a folder name: no separators, no leading dot, at most 128 characters.

    A name that had to be changed ends in eight digits of its hash, so that no two become one.
    """
    clean = re.sub(r"[^\w.+=@, ()-]", "_", case_id).lstrip(".").strip()
    if clean == case_id and len(clean.encode()) <= _MAX_NAME and clean not in _TAKEN_NAMES:
        return clean
    mark = hashlib.sha256(case_id.encode(errors="surrogateescape")).hexdigest()[:8]
    short = clean.encode()[: _MAX_NAME - 9].decode(errors="ignore")
    return f"{short}-{mark}" if short else mark


def write_case_folder(
    folder: Path,
    volume: Volume,
    scan_findings: ScanFindings,
    source: dict[str, Any],
    window_hu: tuple[float, float] | None = None,
) -> None:
    """Write findings.json, .csv and .nii.gz, a picture per finding and source.json into ``folder``.

    All is written into a hidden folder beside it, which is then renamed; an old ``folder`` goes.
    ``source`` says what the findings came from, for ``count_kept``; ``window_hu`` is as in
    ``write_finding_pictures``.
    """
    _remove_left(folder)
    temporary = folder.with_name(f"{PARTIAL}{os.getpid()}-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_finding_labels(temporary / "findings.nii.gz", scan_findings)
        write_finding_pictures(temporary, volume, scan_findings, window_hu)
        atomic_write_text(temporary / SOURCE_FILE, json.dumps(source, indent=2) + "\n")
        write_findings(temporary, scan_findings)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_left(folder: Path) -> None:
    """Remove what processes that were killed while they wrote ``folder`` left beside it."""
    left = re.compile(rf"{re.escape(PARTIAL)}(\d+)-{re.escape(folder.name)}(-old)?")
    for path in folder.parent.glob(f"{PARTIAL}*"):
        found = left.fullmatch(path.name)
        if found and not _runs(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's, and there
    return True


def count_kept(folder: Path, source: dict[str, Any]) -> tuple[int, int] | None:
    """Return how many findings and candidates a finished folder from ``source`` has, else None."""
    try:
        if json.loads((folder / SOURCE_FILE).read_bytes()) == source:
            kept = read_findings(folder)
            return len(kept.findings), len(kept.candidates)
    except (OSError, ValueError, MedvisionError):
        return None
    return None


def _replace_folder(temporary: Path, folder: Path) -> None:
    """Put a finished folder in place; renaming cannot replace an old one, so it steps aside."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = temporary.with_name(f"{temporary.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
