"""Small pictures of a place in a scan: three slices, the reference outlined, the findings boxed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvision.findings.finding import Finding
from medvision.geometry import Affine, Box, spacing_of
from medvision.labels.annotation import Annotation
from medvision.scans.volume import Volume

CROP_MM = 64.0
"""Side of a picture in the patient, if the lesion is not too large for that."""

REFERENCE_COLOR = (86, 180, 233)
FINDING_COLOR = (230, 159, 0)
IGNORED_COLOR = (154, 165, 177)

_GREYS = 253
_REFERENCE, _FINDING, _IGNORED = range(_GREYS, _GREYS + 3)

_PIXELS = 208
_GAP = 6
_LUNG_HU = (-1350.0, 150.0)
_SOFT_TISSUE_HU = (-160.0, 240.0)


@dataclass(frozen=True)
class Marks:
    """What is drawn: ``findings`` boxed solid, ``weak`` (below the threshold) dashed."""

    annotations: Sequence[Annotation] = ()
    findings: Sequence[Finding] = ()
    weak: Sequence[Finding] = ()


@dataclass(frozen=True)
class Picture:
    """PNG bytes, and in words the slices shown, the window and which way is up and left."""

    png: bytes
    slices: tuple[int, ...]
    window: str
    directions: str


@dataclass(frozen=True)
class _View:
    """Where a square crop is sampled, in voxel indices: rows ``[n, 1]``, columns ``[1, n]``."""

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]


def draw(volume: Volume, center: ArrayLike, size_mm: float, marks: Marks) -> Picture:
    """Draw the slice at ``center`` (slice, row, column index) between its two neighbours.

    ``size_mm`` is that of the lesion: one too large for CROP_MM gets half as much room again.
    """
    middle = np.asarray(center, dtype=float)
    last = volume.shape[0] - 1
    key = int(np.clip(round(float(middle[0])), 0, last))
    numbers = tuple(number for number in (key - 1, key, key + 1) if 0 <= number <= last)
    view = _view(volume.affine, middle, max(CROP_MM, 1.5 * size_mm))
    planes = {number: _sample(volume.array[number], view) for number in numbers}
    low, high, window = _window(volume, planes[key])
    panels = []
    for number in numbers:
        grey = np.clip((planes[number] - low) / (high - low), 0, 1) * (_GREYS - 1)
        grey[~_rectangle(view, 0, 0, *volume.shape[1:])] = 0
        panel = grey.astype(np.uint8)
        _mark(panel, view, number, marks)
        panels += [panel, np.full((_PIXELS, _GAP), _GREYS - 1, dtype=np.uint8)]
    picture = np.concatenate(panels[:-1], axis=1)
    return Picture(_png(picture), numbers, window, _directions(volume.affine))


def _view(affine: Affine, middle: NDArray[np.float64], size_mm: float) -> _View:
    offsets = ((np.arange(_PIXELS) + 0.5) / _PIXELS - 0.5) * size_mm
    _, row_mm, column_mm = spacing_of(affine)
    rows = middle[1] + _display_sign(affine, 1) * offsets / row_mm
    columns = middle[2] + _display_sign(affine, 2) * offsets / column_mm
    return _View(rows[:, None], columns[None, :])


def _display_sign(affine: Affine, axis: int) -> int:
    """Return -1 where an axis runs against the radiological view: down the picture, or rightwards.

    Right of the picture is the patient's left or back; down is the back or the feet.
    """
    direction = affine[:3, axis]
    main = int(np.abs(direction).argmax())
    wanted = -1.0 if main == 2 else 1.0
    return 1 if direction[main] * wanted > 0 else -1


def _directions(affine: Affine) -> str:
    names = (("R", "L"), ("A", "P"), ("F", "H"))
    letters = []
    for axis in (1, 2):
        direction = -affine[:3, axis] * _display_sign(affine, axis)
        main = int(np.abs(direction).argmax())
        letters.append(names[main][int(direction[main] > 0)])
    return f"top {letters[0]}, left {letters[1]}"


def _sample(plane: NDArray, view: _View) -> NDArray[np.float64]:
    from scipy.ndimage import map_coordinates

    rows, columns = np.broadcast_arrays(view.rows, view.columns)
    return map_coordinates(plane.astype(np.float32), [rows, columns], order=1, mode="nearest")


def _window(volume: Volume, plane: NDArray[np.float64]) -> tuple[float, float, str]:
    if volume.source.modality == "CT" or volume.array.min() <= -500:
        if np.percentile(plane, 25) < -500:
            return (*_LUNG_HU, "lung window -1350 to 150 HU")
        return (*_SOFT_TISSUE_HU, "soft tissue window -160 to 240 HU")
    low, high = (float(value) for value in np.percentile(plane, (0.5, 99.5)))
    high = high if high > low else low + 1
    return low, high, f"window {low:.4g} to {high:.4g}"


def _mark(panel: NDArray[np.uint8], view: _View, number: int, marks: Marks) -> None:
    for item in sorted(marks.annotations, key=lambda item: not item.ignore):
        color = _IGNORED if item.ignore else _REFERENCE
        panel[_edge(_annotation_area(item, view, number), dashed=item.ignore)] = color
    for items, dashed in ((marks.weak, True), (marks.findings, False)):
        for finding in items:
            panel[_edge(_finding_area(finding, view, number), dashed=dashed)] = _FINDING


def _annotation_area(item: Annotation, view: _View, number: int) -> NDArray[np.bool_]:
    area = _box_area(item.box, view, number)
    if item.mask is None or not area.any():
        return area
    start = [axis.start for axis in item.box.slices]
    plane = item.mask[number - start[0]]
    # Voxel i reaches from i - 0.5 to i + 0.5: the voxel that holds the sample.
    rows = np.floor(view.rows + 0.5).astype(int) - start[1]
    columns = np.floor(view.columns + 0.5).astype(int) - start[2]
    inside = plane[np.clip(rows, 0, plane.shape[0] - 1), np.clip(columns, 0, plane.shape[1] - 1)]
    return area & inside


def _finding_area(finding: Finding, view: _View, number: int) -> NDArray[np.bool_]:
    if not finding.slice_boxes:
        return _box_area(finding.box, view, number)
    area = np.zeros((_PIXELS, _PIXELS), dtype=bool)
    for one in finding.slice_boxes:
        if one.slice_index == number:
            area |= _rectangle(view, one.row_min, one.column_min, one.row_max, one.column_max)
    return area


def _box_area(box: Box, view: _View, number: int) -> NDArray[np.bool_]:
    if not box.slices[0].start <= number < box.slices[0].stop:
        return np.zeros((_PIXELS, _PIXELS), dtype=bool)
    return _rectangle(view, box.row_min, box.column_min, box.row_max, box.column_max)


def _rectangle(
    view: _View, row_min: float, column_min: float, row_max: float, column_max: float
) -> NDArray[np.bool_]:
    rows = (view.rows + 0.5 >= row_min) & (view.rows + 0.5 < row_max)
    columns = (view.columns + 0.5 >= column_min) & (view.columns + 0.5 < column_max)
    return rows & columns


def _edge(area: NDArray[np.bool_], *, dashed: bool) -> NDArray[np.bool_]:
    """Mark the two pixels just outside an area, so that what is inside stays visible."""
    grown = area
    for _ in range(2):
        around = np.pad(grown, 1)
        grown = (
            around[1:-1, 1:-1] | around[:-2, 1:-1] | around[2:, 1:-1]
            | around[1:-1, :-2] | around[1:-1, 2:]
        )  # fmt: skip
    edge = grown & ~area
    if dashed:
        rows, columns = np.indices(area.shape)
        edge &= (rows // 5 + columns // 5) % 2 == 0
    return edge


def _png(picture: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    # One byte a pixel: greys, then the colours of the marks.
    greys = np.repeat(np.linspace(0, 255, _GREYS).round().astype(int), 3).tolist()
    image = Image.fromarray(picture)
    image.putpalette([*greys, *REFERENCE_COLOR, *FINDING_COLOR, *IGNORED_COLOR])
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
