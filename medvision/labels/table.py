"""The CSV beside a label volume: one row per lesion with its class and its box."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from difflib import get_close_matches
from pathlib import Path

from medvision.errors import InputError
from medvision.files import atomic_write_text
from medvision.geometry import Box, BoxMm

BOX_COLUMNS = ("slice_min", "row_min", "column_min", "slice_max", "row_max", "column_max")
BOX_MM_COLUMNS = ("x_min_mm", "y_min_mm", "z_min_mm", "x_max_mm", "y_max_mm", "z_max_mm")
COLUMNS = ("label", "class", "ignore", *BOX_COLUMNS, *BOX_MM_COLUMNS, "diameter_mm")


@dataclass(frozen=True)
class LabelRow:
    """One lesion as the CSV names it; the boxes and the diameter are None where the CSV has none.

    ``box`` is in voxel edges, half-open; ``box_mm`` is in LPS mm.
    """

    label: int
    class_name: str
    ignore: bool = False
    box: Box | None = None
    box_mm: BoxMm | None = None
    diameter_mm: float | None = None


def write_table(path: Path, rows: Iterable[LabelRow]) -> None:
    """Write rows as CSV, atomically; no rows give a file with only the header: a healthy scan."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        edges = [_edge_text(value) for value in astuple(row.box)] if row.box else [""] * 6
        edges_mm = [_mm_text(value) for value in astuple(row.box_mm)] if row.box_mm else [""] * 6
        diameter = "" if row.diameter_mm is None else _mm_text(row.diameter_mm)
        names = [row.label, row.class_name.strip(), int(row.ignore)]
        writer.writerow([*names, *edges, *edges_mm, diameter])
    atomic_write_text(path, text.getvalue())


def read_table(path: Path) -> list[LabelRow]:
    """Read the rows of a label CSV; columns may come in any order, further ones are passed over.

    Raises InputError that names the file and the line for a missing column, a value of the wrong
    kind, an empty class, the class "background" or a label that comes twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("A label CSV must be UTF-8 text.", where=path, why=str(error)) from error
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    _check_columns(reader.fieldnames or (), path)
    rows = []
    for fields in reader:
        cleaned = {name: (value or "").strip() for name, value in fields.items() if name}
        if any(cleaned.values()):
            rows.append(_row(cleaned, f"{path}, line {reader.line_num}"))
    labels = [row.label for row in rows]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise InputError(f"Every label may come once in a label CSV; twice: {twice}.", where=path)
    return rows


def check_class_name(name: str, where: object) -> None:
    """Raise InputError for a class name that is empty or is "background", which is no lesion."""
    if not name.strip() or name.strip().lower() == "background":
        raise InputError(
            f"A lesion's class must have a name other than background; got {name!r}.",
            where=where,
            do="Name the class of the lesion, or take the lesion out.",
        )


def _check_columns(names: Sequence[str], path: Path) -> None:
    missing = [name for name in ("label", "class") if name not in names]
    if missing:
        raise InputError(
            f"A label CSV needs the columns {' and '.join(missing)}; it has {list(names)}.",
            where=path,
            do="Start the file with the line: label,class,ignore (with commas).",
        )
    for name in names:
        close = get_close_matches(name, COLUMNS, n=1, cutoff=0.8)
        if name not in COLUMNS and close and close[0] not in names:
            raise InputError(f"Unknown column {name!r}; did you mean {close[0]!r}?", where=path)


def _row(fields: dict[str, str], where: str) -> LabelRow:
    label = _number(fields, "label", where)
    if label is None or label < 1 or label != int(label):
        raise InputError(
            f"label must be a whole number from 1; got {fields['label']!r}.", where=where
        )
    check_class_name(fields["class"], where)
    box = _numbers(fields, BOX_COLUMNS, where)
    box_mm = _numbers(fields, BOX_MM_COLUMNS, where)
    return LabelRow(
        label=int(label),
        class_name=fields["class"],
        ignore=_flag(fields.get("ignore", ""), where),
        box=_box(box, where) if box else None,
        box_mm=_box_mm(box_mm, where) if box_mm else None,
        diameter_mm=_number(fields, "diameter_mm", where),
    )


def _box(edges: Sequence[float], where: str) -> Box:
    try:
        return Box(*edges)
    except InputError as error:
        raise InputError(error.what, where=where) from error


def _box_mm(edges: Sequence[float], where: str) -> BoxMm:
    if not all(low < high for low, high in zip(edges[:3], edges[3:], strict=True)):
        raise InputError(
            f"A box in mm needs each min below its max; got {tuple(edges)}.", where=where
        )
    return BoxMm(*edges)


def _flag(text: str, where: str) -> bool:
    values = {"": False, "0": False, "false": False, "1": True, "true": True}
    if text.lower() not in values:
        raise InputError(f"ignore must be 0 or 1; got {text!r}.", where=where)
    return values[text.lower()]


def _numbers(fields: dict[str, str], names: Sequence[str], where: str) -> list[float]:
    """Return all the named numbers, or [] where none is given; some but not all is an error."""
    values = [_number(fields, name, where) for name in names]
    known = [value for value in values if value is not None]
    if known and len(known) < len(names):
        absent = [name for name, value in zip(names, values, strict=True) if value is None]
        raise InputError(f"A box needs all its columns; empty: {', '.join(absent)}.", where=where)
    return known


def _number(fields: dict[str, str], name: str, where: str) -> float | None:
    text = fields.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} must be a finite number; got {text!r}.", where=where)
    return value


def _edge_text(value: float) -> str:
    """Keep every digit: a box that is known from the CSV alone must come back as it was."""
    return repr(float(value)).removesuffix(".0")


def _mm_text(value: float) -> str:
    return f"{value:.3f}"
