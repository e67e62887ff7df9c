"""Take scan values to 0..1 for the network and for pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def window_limits(array: NDArray, window_hu: tuple[float, float] | None) -> tuple[float, float]:
    """Return the values that become 0 and 1: ``window_hu``, or the 0.5 and 99.5 percent points.

    The percentages are for MR, whose values have no unit; a constant scan gets a width of 1.
    """
    if window_hu is not None:
        return window_hu
    # A few hundred thousand voxels fix a percentile to well under one grey level.
    sample = array.ravel()[:: max(1, array.size // 500_000)]
    low, high = np.percentile(sample, (0.5, 99.5)).tolist()
    return (low, high if high > low else low + 1.0)


def apply_window(values: NDArray, limits: tuple[float, float]) -> NDArray[np.float32]:
    """Map ``low..high`` linearly to 0..1 and clip beyond."""
    low, high = limits
    scaled = (np.asarray(values, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(scaled, 0.0, 1.0, out=scaled)
