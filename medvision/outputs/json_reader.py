"""Read findings.json back; whatever is wrong in it is named by file and field."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from medvision.errors import InputError, UsageError
from medvision.findings.finding import Finding, ScanFindings, SliceBox
from medvision.geometry import PATIENT_FRAME, Box, BoxMm

SCHEMA_VERSION = "1"
"""Version of the layout of findings.json; it grows when a field changes its meaning or goes."""

_EDGES = ("slice_min", "row_min", "column_min", "slice_max", "row_max", "column_max")
_EDGES_MM = ("x_min_mm", "y_min_mm", "z_min_mm", "x_max_mm", "y_max_mm", "z_max_mm")
_PLANE_EDGES = ("row_min", "column_min", "row_max", "column_max")


def read_findings(path: Path) -> ScanFindings:
    """Read a findings.json, or that of a folder, as ScanFindings; masks are None.

    Fields that schema version 1 does not name are passed over. Raises UsageError if the file cannot
    be opened and InputError, with the file and the field, if it is not what medvision writes:
    another schema version, a missing field, a number that is not finite, a box upside down.
    """
    file = path / "findings.json" if path.is_dir() else path
    top = _Fields(_load(file), file, "")
    version = top.text("schema_version")
    if version != SCHEMA_VERSION:
        top.fail("schema_version", f"must be {SCHEMA_VERSION!r}", version)
    if top.text("frame") != PATIENT_FRAME:
        top.fail("frame", f"must be {PATIENT_FRAME!r}", top.text("frame"))
    grid = top.fields("grid")
    if grid.text("index_order") != "slice,row,column":
        grid.fail("index_order", "must be 'slice,row,column'", grid.text("index_order"))
    shape, affine = _shape(grid), _affine(grid)
    names = tuple(top.texts("class_names"))
    items = [_finding(item, names, shape) for item in top.items("findings")]
    candidates = [_finding(item, names, shape) for item in top.items("candidates")]
    ids = [item.finding_id for item in (*items, *candidates)]
    if len(set(ids)) < len(ids):
        top.fail("findings", "must have each finding_id once", ids)
    return ScanFindings(
        case_id=top.text("case_id"),
        shape=shape,
        affine=affine,
        findings=tuple(items),
        candidates=tuple(candidates),
        score_thresh=top.number("score_thresh", 0, 1),
        class_names=names,
        modality=top.text("modality"),
        study_instance_uid=top.text("study_instance_uid"),
        series_instance_uid=top.text("series_instance_uid"),
        frame_of_reference_uid=top.text("frame_of_reference_uid"),
        notes=tuple(top.texts("notes")),
        model={name: top.fields("model").text(name) for name in top.fields("model").names},
    )


class _Fields:
    """A JSON object with its place in the file, whose members come out checked."""

    def __init__(self, value: object, file: Path, place: str) -> None:
        self._file = file
        self._place = place
        if not isinstance(value, dict):
            self.fail("", "must be an object", value)
        self._members: dict[str, Any] = value

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def fail(self, name: str, rule: str, got: object) -> NoReturn:
        place = ".".join(part for part in (self._place, name) if part) or "the document"
        raise InputError(f"{place} {rule}; got {str(got)[:80]!r}.", where=self._file)

    def get(self, name: str) -> Any:
        if name not in self._members:
            self.fail(name, "must be there", "no such field")
        return self._members[name]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            self.fail(name, "must be a string", value)
        return value

    def texts(self, name: str) -> list[str]:
        values = self.array(name)
        if not all(isinstance(value, str) for value in values):
            self.fail(name, "must be a list of strings", values)
        return values

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, "must be a number", value)
        if abs(value) > sys.float_info.max or not low <= value <= high:
            limits = "" if math.isinf(low) else f" from {low:g}"
            limits += "" if math.isinf(high) else f" to {high:g}"
            self.fail(name, f"must be a finite number{limits}", value)
        return float(value)

    def whole(self, name: str, low: float, high: float = math.inf) -> int:
        value = self.number(name, low, high)
        if value != int(value):
            self.fail(name, "must be a whole number", value)
        return int(value)

    def array(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list):
            self.fail(name, "must be a list", value)
        return value

    def place_of(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def fields(self, name: str) -> _Fields:
        return _Fields(self.get(name), self._file, self.place_of(name))

    def items(self, name: str) -> list[_Fields]:
        place = self.place_of(name)
        values = enumerate(self.array(name))
        return [_Fields(value, self._file, f"{place}[{index}]") for index, value in values]


def _load(file: Path) -> object:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(file.read_bytes(), parse_constant=refuse)
    except OSError as error:
        raise UsageError("Findings must be readable.", where=file, why=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            "A findings file must be JSON as medvision writes it.", where=file, why=str(error)
        ) from error


def _shape(grid: _Fields) -> tuple[int, int, int]:
    values = grid.array("shape")
    if len(values) != 3 or not all(type(size) is int and size > 0 for size in values):
        grid.fail("shape", "must be three whole numbers above 0", values)
    return (values[0], values[1], values[2])


def _affine(grid: _Fields) -> np.ndarray:
    values = grid.array("affine")
    try:
        affine = np.array(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        grid.fail("affine", "must be a 4 x 4 matrix of numbers", values)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        grid.fail("affine", "must be a finite 4 x 4 matrix", values)
    if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        grid.fail("affine", "must have independent axes", values)
    return affine


def _finding(item: _Fields, class_names: tuple[str, ...], shape: tuple[int, int, int]) -> Finding:
    if item.text("class") not in class_names:
        item.fail("class", f"must be one of {list(class_names)}", item.text("class"))
    scores = item.fields("class_scores")
    center = item.fields("center_mm")
    return Finding(
        finding_id=item.whole("finding_id", 1),
        class_name=item.text("class"),
        score=item.number("score", 0, 1),
        box=_box(item.fields("box_voxel")),
        box_mm=_box_mm(item.fields("box_mm")),
        center_mm=(center.number("x"), center.number("y"), center.number("z")),
        key_slice=item.whole("key_slice", 0, shape[0] - 1),
        diameter_mm=item.number("diameter_mm", 0),
        volume_mm3=item.number("volume_mm3", 0),
        class_scores={name: scores.number(name, 0, 1) for name in scores.names},
        slice_boxes=tuple(_slice_box(box, shape) for box in item.items("slice_boxes")),
    )


def _box(fields: _Fields) -> Box:
    edges = [fields.number(name) for name in _EDGES]
    _check_order(fields, edges)
    return Box(*edges)


def _box_mm(fields: _Fields) -> BoxMm:
    edges = [fields.number(name) for name in _EDGES_MM]
    _check_order(fields, edges)
    return BoxMm(*edges)


def _slice_box(fields: _Fields, shape: tuple[int, int, int]) -> SliceBox:
    edges = [fields.number(name) for name in _PLANE_EDGES]
    _check_order(fields, edges)
    index = fields.whole("slice_index", 0, shape[0] - 1)
    row_min, column_min, row_max, column_max = edges
    score = fields.number("score", 0, 1)
    return SliceBox(index, row_min, column_min, row_max, column_max, score)


def _check_order(fields: _Fields, edges: list[float]) -> None:
    half = len(edges) // 2
    if not all(low < high for low, high in zip(edges[:half], edges[half:], strict=True)):
        fields.fail("", "must have each min below its max", edges)
