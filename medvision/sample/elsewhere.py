"""Where the healthy training scans from elsewhere in the body are cut: together they show most of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.geometry import Box
from medvision.sample.cases import lung_window
from medvision.sample.config import SampleConfig
from medvision.sample.lungs import Chest

_PURPOSE = 4
_CANDIDATES = 20000
_BODY_HU = -300
"""What is above it is body: neither air, nor lung, nor the table's foam."""

_EVERY = (2, 8, 8)
"""Slices, rows and columns that are counted: every voxel would tell the same."""

_EDGE = (2, 16, 16)
"""Slices, rows and columns at a sub-volume's edge: crops seldom show them, and never what is around."""

_AGAIN = 0.25
"""What a place counts that was shown before, against what it counted then."""


def choose_elsewhere(chest: Chest, config: SampleConfig, count: int) -> list[Box]:
    """Return ``count`` sub-volumes of the body, each the one of many that adds most to those before.

    A detector that has seen lung alone takes stool in the colon for a nodule, and sub-volumes drawn
    independently showed it hardly any colon. A place counts where it is not at the edge, and a quarter each
    further time: what one sub-volume alone shows is not learned from if that is held out. Each holds less
    of the training lung than the others do, and nothing of what test shows. The greedy choice reaches at
    least 1 - 1/e of the best one's worth (Nemhauser et al., Mathematical Programming 14, 1978). InputError
    if there is no such sub-volume.
    """
    if not count:
        return []
    boxes = candidates(chest, config)
    if not boxes:
        raise InputError(
            "No sub-volume of the training size lies in the body outside the test lung."
        )
    worth = (chest.volume.array > _BODY_HU).astype(np.float32)
    chosen = []
    for _ in range(count):
        best = max(boxes, key=lambda box: float(_thinned(worth, _inner(box)).sum()))
        worth[_inner(best).slices] *= _AGAIN
        chosen.append(best)
    return chosen


def _inner(box: Box) -> Box:
    return Box(*(box.lower + _EDGE).tolist(), *(box.upper - _EDGE).tolist())


def candidates(chest: Chest, config: SampleConfig) -> list[Box]:
    """Return sub-volumes, drawn from all, that show body, little of one lung and nothing of the other."""
    rng = np.random.default_rng([config.seed, _PURPOSE])
    size = np.array(config.train.size)
    high = np.maximum(np.array(chest.volume.shape) - size, 0)
    test = lung_window(chest, config.test.margin)
    body = chest.volume.array > _BODY_HU
    boxes = []
    for start in rng.integers(0, high + 1, (_CANDIDATES, 3)):
        box = Box(*start.tolist(), *(start + size).tolist())
        if not ((box.upper <= test.lower) | (box.lower >= test.upper)).any():
            continue
        lung = _thinned(chest.right.mask, box).mean()
        shown = _thinned(body, box).mean()
        if lung < config.train.min_lung_fraction and shown >= config.train.min_body_fraction:
            boxes.append(box)
    return boxes


def _thinned(values: NDArray, box: Box) -> NDArray:
    return values[tuple(slice(a.start, a.stop, n) for a, n in zip(box.slices, _EVERY, strict=True))]
