"""A PNG per finding for a quick look without a viewer; outputs/picture.py draws it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.files import atomic_write_bytes
from medvision.findings.finding import ScanFindings
from medvision.outputs.picture import Picture
from medvision.scans.volume import Volume

MAX_PICTURES = 50
"""Pictures per scan, highest scores first; a scan with more findings is read in a viewer."""

_SAMPLE = 2_000_000
"""About as many voxels fix the percentiles; all of them would take seconds."""


def write_finding_pictures(
    folder: Path,
    volume: Volume,
    scan_findings: ScanFindings,
    window_hu: tuple[float, float] | None = None,
) -> list[Path]:
    """Write ``folder/finding_01.png`` and so on, named by ``finding_id``; return their paths.

    ``window_hu`` is the (low, high) value shown black and white; None takes the scan's 1st and 99th
    percentile. Pixels are drawn to scale in mm and slices turned as radiologists hang them. No name
    or id of a patient or case is burned in. At most ``MAX_PICTURES``, the highest scores.
    Raises InputError if the findings are of a scan of another shape or the window is empty.
    """
    if volume.shape != tuple(scan_findings.shape):
        raise InputError(
            f"Findings and scan must have one shape; got {scan_findings.shape} and {volume.shape}."
        )
    if not scan_findings.findings:
        return []
    low, high = window_hu or percentile_window(volume.array)
    if not low < high:
        raise InputError(f"A window needs low below high; got {low} and {high}.")
    best = sorted(scan_findings.findings, key=lambda item: (-item.score, item.finding_id))
    paths = []
    for finding in sorted(best[:MAX_PICTURES], key=lambda item: item.finding_id):
        picture = Picture(volume, finding, (low, high), scan_findings.modality)
        data = BytesIO()
        picture.draw(len(scan_findings.findings)).save(data, "PNG", compress_level=3)
        path = folder / f"finding_{finding.finding_id:02d}.png"
        atomic_write_bytes(path, data.getvalue())
        paths.append(path)
    return paths


def percentile_window(array: NDArray) -> tuple[float, float]:
    """Return the 1st and the 99th percentile of a scan, half a unit apart from it if it is flat."""
    step = max(1, round((array.size / _SAMPLE) ** 0.5))
    low, high = np.nanpercentile(array[:, ::step, ::step], (1, 99)).tolist()
    return (low, high) if low < high else (low - 0.5, low + 0.5)
