"""Draw one finding: the key slice with its box, the lesion enlarged, the slices beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medvision._version import __version__
from medvision.findings.finding import Finding
from medvision.outputs.slice_view import PlaneBox, SliceView, view_of
from medvision.scans.volume import Volume

if TYPE_CHECKING:
    from PIL.Image import Image

Corners = tuple[int, int, int, int]
"""left, top, right, bottom in pixels of the picture."""

_SIZE = (1024, 720)
_WHOLE: Corners = (8, 8, 632, 632)
_ZOOM: Corners = (640, 8, 1016, 384)
_BEFORE: Corners = (640, 408, 824, 592)
_AFTER: Corners = (832, 408, 1016, 592)

_BOX_COLOR = (255, 210, 0)
_TEXT_COLOR = (232, 232, 232)
_DIM_COLOR = (150, 150, 150)

_ZOOM_BOXES = 3.0
_ZOOM_LEAST_MM = 30.0
"""The enlarged part is three boxes wide, and never less than this."""

_BAR_LENGTHS_MM = (0.001, 0.01, 0.1, 1, 2, 5, 10, 20, 50, 100)

_MAX_NAME = 40
"""A longer class name is cut short: the caption is one line."""

_PROJECTIONS = frozenset({"CR", "DX", "MG", "RF", "XA", "US", "SM", "XC", "ES", "OP", "GM", "OT"})
"""Modalities whose rows and columns need not lie along patient axes: no orientation letters."""


@dataclass(frozen=True)
class _Panel:
    """A part of the picture that shows ``region`` of a turned slice as large as fits, in scale."""

    corners: Corners
    region: PlaneBox
    pixel_mm: tuple[float, float]

    @property
    def scale(self) -> float:
        """Pixels of the picture per mm."""
        left, top, right, bottom = self.corners
        height_mm, width_mm = self.region_mm
        return min((right - left) / width_mm, (bottom - top) / height_mm)

    @property
    def region_mm(self) -> tuple[float, float]:
        top, left, bottom, right = self.region
        return (bottom - top) * self.pixel_mm[0], (right - left) * self.pixel_mm[1]

    @property
    def inner(self) -> Corners:
        """Where the slice itself lands: in the middle of the panel."""
        left, top, right, bottom = self.corners
        height, width = (max(1, round(size * self.scale)) for size in self.region_mm)
        x, y = (left + right - width) // 2, (top + bottom - height) // 2
        return (x, y, x + width, y + height)

    def place(self, box: PlaneBox) -> tuple[float, float, float, float]:
        """Return a box of the turned slice as left, top, right, bottom of the picture."""
        x, y, right, bottom = self.inner
        across = (right - x) / (self.region[3] - self.region[1])
        down = (bottom - y) / (self.region[2] - self.region[0])
        return (
            x + (box[1] - self.region[1]) * across,
            y + (box[0] - self.region[0]) * down,
            x + (box[3] - self.region[1]) * across,
            y + (box[2] - self.region[0]) * down,
        )


class Picture:
    """The picture of one finding; ``window_hu`` is (low, high), shown black and white."""

    def __init__(
        self,
        volume: Volume,
        finding: Finding,
        window_hu: tuple[float, float],
        modality: str = "",
    ) -> None:
        from PIL import Image, ImageDraw

        self._volume = volume
        self._finding = finding
        self._window = window_hu
        self._view: SliceView = view_of(volume.affine, volume.shape)
        self._letters = modality not in _PROJECTIONS
        self._image = Image.new("RGB", _SIZE)
        self._draw = ImageDraw.Draw(self._image)

    def draw(self, findings_in_scan: int) -> Image:
        """Draw it all and return the image, 1024 x 720 pixels RGB."""
        slices, rows, columns = self._volume.shape
        key = min(max(self._finding.key_slice, 0), slices - 1)
        size = self._view.turn_box((0, 0, rows, columns))[2:]
        whole = _Panel(_WHOLE, (0, 0, *size), self._view.pixel_mm)
        region = _zoom_region(self._box_on(key), size, self._view.pixel_mm)
        self._show(whole, key, margin=5)
        self._show(_Panel(_ZOOM, region, self._view.pixel_mm), key, margin=1)
        self._scale_bar(_Panel(_ZOOM, region, self._view.pixel_mm))
        for corners, step in ((_BEFORE, -1), (_AFTER, 1)):
            self._neighbour(_Panel(corners, region, self._view.pixel_mm), key, step)
        if self._letters:
            self._orientation(whole)
        self._caption(key, findings_in_scan)
        return self._image

    def _box_on(self, index: int) -> PlaneBox:
        """Return the box on a slice, turned: the detector's own, else that of the finding."""
        box: Any = self._finding.box
        for slice_box in self._finding.slice_boxes:
            if slice_box.slice_index == index:
                box = slice_box
        return self._view.turn_box((box.row_min, box.column_min, box.row_max, box.column_max))

    def _show(self, panel: _Panel, index: int, margin: int) -> None:
        from PIL import Image

        low, high = self._window
        plane = np.nan_to_num(self._volume.array[index].astype(np.float32), nan=low)
        gray = (np.clip((plane - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        turned = Image.fromarray(np.ascontiguousarray(self._view.turn(gray)))
        left, top, right, bottom = panel.inner
        row_min, column_min, row_max, column_max = panel.region
        part = (column_min, row_min, column_max, row_max)
        shown = turned.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=part)
        self._image.paste(shown, (left, top))
        if floor(self._finding.box.slice_min) <= index < self._finding.box.slice_max:
            x_min, y_min, x_max, y_max = panel.place(self._box_on(index))
            edges = (
                max(x_min - margin, left),
                max(y_min - margin, top),
                min(x_max + margin, right - 1),
                min(y_max + margin, bottom - 1),
            )
            if edges[0] < edges[2] and edges[1] < edges[3]:
                self._draw.rectangle(edges, outline=_BOX_COLOR, width=2)

    def _neighbour(self, panel: _Panel, key: int, step: int) -> None:
        left, top, right, bottom = panel.corners
        index, count = key + step, self._volume.shape[0]
        inside = 0 <= index < count
        if count == 1:
            return
        if inside:
            self._show(panel, index, margin=1)
        else:
            self._draw.rectangle((left, top, right - 1, bottom - 1), outline=(60, 60, 60))
        text = f"slice {index + 1}/{count}" if inside else "end of scan"
        self._text((left + right) / 2, bottom + 4, text, "ma", 14, _DIM_COLOR)

    def _scale_bar(self, panel: _Panel) -> None:
        left, _, right, bottom = panel.corners
        most_mm = (right - left) / 3 / panel.scale
        length_mm = max(length for length in _BAR_LENGTHS_MM if length <= max(most_mm, 0.001))
        width = length_mm * panel.scale
        self._draw.line((left + 4, bottom + 12, left + 4 + width, bottom + 12), _DIM_COLOR, 2)
        self._text(left + 10 + width, bottom + 12, f"{length_mm:g} mm", "lm", 14, _DIM_COLOR)

    def _orientation(self, panel: _Panel) -> None:
        left, top, right, bottom = panel.corners
        middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
        self._text(left + 4, middle_y, self._view.left, "lm", 18)
        self._text(right - 4, middle_y, self._view.right, "rm", 18)
        self._text(middle_x, top + 2, self._view.top, "ma", 18)
        self._text(middle_x, bottom - 2, self._view.bottom, "md", 18)

    def _caption(self, key: int, findings_in_scan: int) -> None:
        item = self._finding
        name = " ".join(item.class_name.split())
        name = name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "..."
        facts = [
            f"score {item.score:.2f}",
            f"diameter {item.diameter_mm:.1f} mm",
            f"slice {key + 1}/{self._volume.shape[0]}",
        ]
        title = f"Finding {item.finding_id} of {findings_in_scan}: {name}"
        self._text(_WHOLE[0], 651, title, "lm", 19)
        self._text(_WHOLE[0], 678, "    ".join(facts), "lm", 17)
        use = f"For research use only. Not for diagnosis. medvision {__version__}"
        self._text(_WHOLE[0], 703, use, "lm", 14, _DIM_COLOR)

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str,
        size: int,
        color: tuple[int, int, int] = _TEXT_COLOR,
    ) -> None:
        """Write light text with a black rim: it must be read on air and on bone."""
        self._draw.text(
            (x, y), text, color, _font(size), anchor, stroke_width=2, stroke_fill=(0, 0, 0)
        )


def _zoom_region(
    box: PlaneBox, size: tuple[float, float], pixel_mm: tuple[float, float]
) -> PlaneBox:
    """Return a square of mm around a box, moved and cut to lie in a picture of ``size`` pixels."""
    sides_mm = [(box[axis + 2] - box[axis]) * pixel_mm[axis] for axis in (0, 1)]
    side_mm = max(_ZOOM_LEAST_MM, _ZOOM_BOXES * max(sides_mm))
    edges = []
    for axis in (0, 1):
        length = min(side_mm / pixel_mm[axis], size[axis])
        start = (box[axis] + box[axis + 2] - length) / 2
        start = min(max(start, 0), size[axis] - length)
        edges.append((start, start + length))
    return (edges[0][0], edges[1][0], edges[0][1], edges[1][1])


@lru_cache
def _font(size: int) -> Any:
    """Load DejaVu Sans, which matplotlib brings: Pillow's own font knows Latin letters only."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)
