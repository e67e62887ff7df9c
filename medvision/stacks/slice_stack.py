"""A slice with its neighbours as the channels of a 2-D picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stack_offsets(n_slices: int, slice_offset_mm: float, spacing_mm: float) -> NDArray[np.float64]:
    """Return where the channels lie relative to the centre slice, in slices of the scan."""
    half = n_slices // 2
    return np.arange(-half, half + 1, dtype=np.float64) * (slice_offset_mm / spacing_mm)


def slice_stack(
    array: NDArray, slice_index: int, offsets: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return ``[channel, row, column]`` around one slice of ``array[slice, row, column]``.

    ``offsets`` are in slices; between two slices the value is interpolated linearly, beyond the
    first and last slice the edge slice is repeated. The middle channel is the slice itself.
    """
    positions = np.clip(slice_index + offsets, 0, len(array) - 1)
    below = np.floor(positions + 1e-6).astype(int)
    above = np.minimum(below + 1, len(array) - 1)
    weight = np.clip(positions - below, 0, 1).astype(np.float32)
    stack = array[below].astype(np.float32)
    for channel in np.flatnonzero(weight > 1e-3):
        upper = array[above[channel]].astype(np.float32)
        stack[channel] += weight[channel] * (upper - stack[channel])
    return stack
