"""Findings as JSON for programs and as CSV for tables; docs/findings-json.md explains both."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

from medvision._version import __version__
from medvision.errors import InputError
from medvision.files import atomic_write_text
from medvision.findings.finding import Finding, ScanFindings
from medvision.geometry import PATIENT_FRAME
from medvision.outputs.json_reader import SCHEMA_VERSION, read_findings

__all__ = ["INTENDED_USE", "findings_to_json", "read_findings", "write_findings"]

INTENDED_USE = "For research use only. Not for diagnosis."
"""Stands in every file of findings that medvision writes."""

_CSV_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A spreadsheet runs a cell that starts so (OWASP, CSV injection)."""


def write_findings(folder: Path, scan_findings: ScanFindings) -> None:
    """Write ``folder/findings.json`` and ``folder/findings.csv``, each atomically.

    No findings give an empty list and a CSV with only its header; candidates are in the JSON alone.
    Masks are not in these files; ``write_finding_labels`` writes them. Raises InputError if a
    number is not finite.
    """
    document = findings_to_json(scan_findings)
    try:
        text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise InputError(
            "Numbers of findings must be finite.",
            where=folder / "findings.json",
            why=f"{error}; case {scan_findings.case_id}",
        ) from error
    atomic_write_text(folder / "findings.json", text + "\n")
    atomic_write_text(folder / "findings.csv", _csv_text(scan_findings))


def findings_to_json(scan_findings: ScanFindings) -> dict[str, object]:
    """Return the document of findings.schema.json as plain dicts and lists."""
    return {
        "schema_version": SCHEMA_VERSION,
        "intended_use": INTENDED_USE,
        "generator": {"name": "medvision", "version": __version__},
        "model": dict(scan_findings.model),
        "case_id": scan_findings.case_id,
        "study_instance_uid": scan_findings.study_instance_uid,
        "series_instance_uid": scan_findings.series_instance_uid,
        "frame_of_reference_uid": scan_findings.frame_of_reference_uid,
        "modality": scan_findings.modality,
        "frame": PATIENT_FRAME,
        "grid": {
            "shape": [int(size) for size in scan_findings.shape],
            "affine": scan_findings.affine.tolist(),
            "index_order": "slice,row,column",
        },
        "class_names": list(scan_findings.class_names),
        "notes": list(scan_findings.notes),
        "score_thresh": float(scan_findings.score_thresh),
        "findings": [_finding_to_json(finding) for finding in scan_findings.findings],
        "candidates": [_finding_to_json(finding) for finding in scan_findings.candidates],
    }


def slice_range(finding: Finding) -> tuple[int, int]:
    """Return the first and the last slice that the finding touches, counted from 0."""
    return math.floor(finding.box.slice_min), math.ceil(finding.box.slice_max) - 1


def _finding_to_json(finding: Finding) -> dict[str, object]:
    first, last = slice_range(finding)
    return {
        "finding_id": int(finding.finding_id),
        "class": finding.class_name,
        "score": float(finding.score),
        "class_scores": {name: float(score) for name, score in finding.class_scores.items()},
        "box_voxel": _floats(asdict(finding.box)),
        "box_mm": _floats(asdict(finding.box_mm)),
        "center_mm": dict(zip("xyz", map(float, finding.center_mm), strict=True)),
        "slice_range": {"first": first, "last": last},
        "key_slice": int(finding.key_slice),
        "diameter_mm": float(finding.diameter_mm),
        "volume_mm3": float(finding.volume_mm3),
        "slice_boxes": [
            {**_floats(asdict(box)), "slice_index": int(box.slice_index)}
            for box in finding.slice_boxes
        ],
    }


def _floats(numbers: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items()}


def _csv_text(scan_findings: ScanFindings) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_csv_header(scan_findings))
    for finding in scan_findings.findings:
        writer.writerow([_cell(value) for value in _csv_row(scan_findings, finding)])
    return text.getvalue()


def _csv_header(scan_findings: ScanFindings) -> list[str]:
    return [
        *("case_id", "series_instance_uid", "finding_id", "class", "score"),
        *("slice_min", "row_min", "column_min", "slice_max", "row_max", "column_max"),
        *("x_min_mm", "y_min_mm", "z_min_mm", "x_max_mm", "y_max_mm", "z_max_mm"),
        *("center_x_mm", "center_y_mm", "center_z_mm"),
        *("first_slice", "last_slice", "key_slice", "diameter_mm", "volume_mm3"),
        *(f"score_{name}" for name in scan_findings.class_names),
    ]


def _csv_row(scan_findings: ScanFindings, finding: Finding) -> list[object]:
    return [
        *(scan_findings.case_id, scan_findings.series_instance_uid),
        *(finding.finding_id, finding.class_name, finding.score),
        *asdict(finding.box).values(),
        *asdict(finding.box_mm).values(),
        *finding.center_mm,
        *(*slice_range(finding), finding.key_slice, finding.diameter_mm, finding.volume_mm3),
        *(finding.class_scores.get(name, "") for name in scan_findings.class_names),
    ]


def _cell(value: object) -> object:
    """Round numbers to 4 decimals; lead text that a spreadsheet would run with an apostrophe."""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_CSV_FORMULA_STARTS) else value
    return value if isinstance(value, int) else round(float(str(value)), 4)
