"""Lesions that are larger than a crop: of them training would see nothing, and say nothing."""

from __future__ import annotations

import logging
import math

import numpy as np
from numpy.typing import NDArray

from medvision.training.cache import CachedCase
from medvision.training.config import TrainConfig
from medvision.training.samples import Lesion

logger = logging.getLogger(__name__)


def share_shown(mask: NDArray[np.bool_], size: int) -> float:
    """Return the largest share of ``mask[row, column]`` that a window of ``size`` by ``size`` pixels holds."""
    rows, columns = (min(size, length) for length in mask.shape)
    sums = np.pad(mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    inside = (
        sums[rows:, columns:]
        - sums[:-rows, columns:]
        - sums[rows:, :-columns]
        + sums[:-rows, :-columns]
    )
    return float(inside.max() / mask.sum())


def too_large(
    lesions: list[Lesion], cases: list[CachedCase], crop_size: int, least_visible: float
) -> list[Lesion]:
    """Return the lesions of which no crop shows the share ``least_visible`` on any of their slices."""
    return [
        lesion
        for lesion in lesions
        if 2 * max(lesion.half_size) > crop_size
        and max(share_shown(plane, crop_size) for plane in _planes(lesion, cases)) < least_visible
    ]


def _planes(lesion: Lesion, cases: list[CachedCase]) -> list[NDArray[np.bool_]]:
    mask = cases[lesion.case].labels[lesion.window] == lesion.label
    return [plane for plane in mask if plane.any()]


def tell_too_large(lesions: list[Lesion], cases: list[CachedCase], config: TrainConfig) -> None:
    """Log how many lesions count neither as lesion nor as background where they are, and what would do."""
    size, share = config.sampling.crop_size, config.sampling.least_visible
    large = too_large(lesions, cases, size, share)
    if not large:
        return
    step = math.lcm(16, config.model.strides[-1])
    needed = size // step * step
    while too_large(large, cases, needed, share):
        needed += step
    logger.warning(
        "%d of %d lesions are too large for crops of %d pixels: less than %.0f %% of each fits, so that "
        "they count neither as lesion nor as background where they are. The first is in %s. "
        "Set sampling.crop_size to %d, or more.",
        len(large),
        len(lesions),
        size,
        100 * share,
        cases[large[0].case].case_id,
        needed,
    )
