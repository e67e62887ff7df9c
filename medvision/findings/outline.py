"""The outline that a model drew of a lesion on one slice, on the grid that the model saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Outline:
    """Pixels ``[row, column]`` of a lesion; where they lie in the scan's own slice, in pixel edges.

    Pixel (0, 0) starts at the edges (``row``, ``column``), and each is ``height`` by ``width`` of the scan's
    pixels large: not 1 where the model saw the scan at another pixel size.
    """

    pixels: NDArray[np.bool_]
    row: float
    column: float
    height: float = 1.0
    width: float = 1.0

    def on_grid(self, size: tuple[int, int], row: int, column: int) -> NDArray[np.bool_]:
        """Return which of ``size`` pixels of the scan from (``row``, ``column``) on have their centre in it."""
        rows = np.floor((np.arange(size[0]) + 0.5 + row - self.row) / self.height).astype(int)
        columns = np.floor((np.arange(size[1]) + 0.5 + column - self.column) / self.width)
        columns = columns.astype(int)
        inside = np.zeros(size, dtype=bool)
        here = (rows >= 0) & (rows < self.pixels.shape[0])
        beside = (columns >= 0) & (columns < self.pixels.shape[1])
        inside[np.ix_(here, beside)] = self.pixels[np.ix_(rows[here], columns[beside])]
        return inside

    def scaled(self, height: float, width: float) -> Outline:
        """Return it on slices that have ``height`` times as many rows and ``width`` as many columns."""
        return Outline(
            self.pixels,
            self.row * height,
            self.column * width,
            self.height * height,
            self.width * width,
        )
