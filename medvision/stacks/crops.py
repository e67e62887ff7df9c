"""Cut windows out of slices and out of whole volumes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medvision.geometry import Box


def crop_padded(array: NDArray, top: int, left: int, size: tuple[int, int], fill: float) -> NDArray:
    """Cut ``size`` rows and columns at (``top``, ``left``) of the last two axes, ``fill`` outside."""
    rows, columns = array.shape[-2:]
    window = np.full((*array.shape[:-2], *size), fill, dtype=array.dtype)
    row_low, row_high = max(top, 0), min(top + size[0], rows)
    column_low, column_high = max(left, 0), min(left + size[1], columns)
    if row_low < row_high and column_low < column_high:
        window[..., row_low - top : row_high - top, column_low - left : column_high - left] = array[
            ..., row_low:row_high, column_low:column_high
        ]
    return window


def body_box(array: NDArray, modality: str, margin: int = 8) -> Box:
    """Return the box of rows and columns that holds the patient; all slices are kept.

    In CT the body is what lies above -500 HU, elsewhere what lies above a twentieth of the 99 percent
    point. A scan of no known modality with a hundredth of its values below -500 is taken for CT: air is
    nowhere else so low. A row or column counts if more than 1 percent of it is body somewhere, which leaves out
    the table's thin edge and noise. If nothing is found, the whole array is returned.
    """
    slices, rows, columns = array.shape
    sample = array[:: max(1, slices // 32)]
    is_ct = modality == "CT" or (not modality and float(np.percentile(sample, 1)) < -500.0)
    threshold = -500.0 if is_ct else float(np.percentile(sample, 99)) / 20
    body = sample > threshold
    row_hits = np.flatnonzero((body.mean(axis=2) > 0.01).any(axis=0))
    column_hits = np.flatnonzero((body.mean(axis=1) > 0.01).any(axis=0))
    if not len(row_hits) or not len(column_hits):
        return Box(0, 0, 0, slices, rows, columns)
    return Box(
        0,
        max(0, int(row_hits[0]) - margin),
        max(0, int(column_hits[0]) - margin),
        slices,
        min(rows, int(row_hits[-1]) + 1 + margin),
        min(columns, int(column_hits[-1]) + 1 + margin),
    )
