"""Copy-paste of lesions: every lesion is seen in many places, which rare classes need most.

Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR
2021; here a lesion moves as the stack of slices that it is, and only to places that look like its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

from medvision.stacks.slice_stack import slice_stack
from medvision.training.cache import CachedCase

_MARGIN = 4
"""Pixels around a lesion that go along: two of blend and two of its own background to compare."""

_LEAST_PIXELS = 4
"""A lesion is zoomed down to about this width and no further: noise would look the same."""

_TRIES = 32
_DARKER, _BRIGHTER = 0.04, 0.08
"""How far the median of a place may lie below and above that of a lesion's own background, in window widths.

56 and 112 HU in a lung window. Further down is gas, in the colon and around the patient: with nodules of
the lung pasted there, stool in the colon is found as one.
"""

_WALL = 0.2
"""What is brighter than this above the lesion's background, in window widths, is vessel, wall or an organ."""

_TOUCHED = 0.05
"""Where a lesion covers more than this share, a place must be free and like its own background."""

_ATTACHED = 0.25
"""Most of a lesion's place that may be vessel or wall: it is then attached to it, as many are.

Were lesions pasted into clear places alone, what touches a wall would hardly ever be one in training.
"""


@dataclass(frozen=True)
class Cutout:
    """A lesion with its surroundings ``[slice, row, column]``, and how much of it is pasted, 0..1."""

    pixels: NDArray
    cover: NDArray[np.float32]
    mask: NDArray[np.bool_]
    background: float


def cut_out(case: CachedCase, label: int, window: tuple[slice, slice, slice], reach: int) -> Cutout:
    """Cut lesion ``label`` in ``window`` out of a case, with ``reach`` slices above and below."""
    grown = tuple(
        slice(max(0, axis.start - margin), min(size, axis.stop + margin))
        for axis, margin, size in zip(
            window, (reach, _MARGIN, _MARGIN), case.labels.shape, strict=True
        )
    )
    pixels = np.array(case.array[grown])
    mask = np.asarray(case.labels[grown]) == label
    # What a lesion covers by less than half is lesion too, in the slice beyond as in the plane.
    core = ndimage.binary_dilation(mask, np.ones((3, 1, 1), dtype=bool))
    core = ndimage.binary_dilation(core, np.ones((1, 3, 3), dtype=bool))
    cover = ndimage.gaussian_filter(core.astype(np.float32), (0.0, 0.7, 0.7))
    around = pixels[cover < 0.01]
    background = float(np.median(around)) if around.size else float(pixels.min())
    return Cutout(pixels, cover, mask, background)


def paste(
    stack: NDArray[np.float32],
    occupied: NDArray[np.bool_],
    cutout: Cutout,
    offsets: NDArray[np.float64],
    width: float,
    border: int,
    generator: np.random.Generator,
    zoom: tuple[float, float] = (1.0, 1.0),
) -> NDArray[np.bool_] | None:
    """Blend a lesion into ``stack[channel, row, column]`` in place; return its mask ``[row, column]``.

    Returns None if no place was found: nothing may be ``occupied[row, column]`` there, and the
    background must be like the lesion's own, but for a part of vessel or wall, which stays what it
    is. ``offsets`` are the lesion's channels in slices of its own scan, ``width`` is the window's;
    ``border`` pixels at the edge are left alone. The middle channel shows one of the slices that the
    lesion is on. ``zoom`` is the smallest and largest size it is shown at, in all three directions,
    against its own.
    """
    plane = int(generator.choice(np.flatnonzero(cutout.mask.any(axis=(1, 2)))))
    factor = _draw_zoom(cutout.mask, zoom, generator)
    pixels = slice_stack(cutout.pixels, plane, offsets / factor)
    cover = slice_stack(cutout.cover, plane, offsets / factor)
    mask = cutout.mask[plane]
    if factor != 1:
        pixels, cover, mask = _zoomed(pixels, cover, mask, factor)
        if not mask.any():
            return None
    pixels, cover, mask = _turned(pixels, cover, mask, int(generator.integers(8)))
    rows, columns = mask.shape
    free = (stack.shape[1] - 2 * border - rows, stack.shape[2] - 2 * border - columns)
    if min(free) <= 0:
        return None
    touched = (cover > _TOUCHED).any(axis=0)
    for _ in range(_TRIES):
        top, left = (border + int(generator.integers(size)) for size in free)
        where = (slice(top, top + rows), slice(left, left + columns))
        if occupied[where][touched].any():
            continue
        outline = _attach(stack[(slice(None), *where)], pixels, cover, mask, cutout, width)
        if outline is not None:
            placed = np.zeros(occupied.shape, dtype=bool)
            placed[where] = outline
            return placed
    return None


def _attach(
    target: NDArray[np.float32],
    pixels: NDArray,
    cover: NDArray,
    mask: NDArray[np.bool_],
    cutout: Cutout,
    width: float,
) -> NDArray[np.bool_] | None:
    """Blend a lesion into ``target[channel, row, column]`` in place; return its outline there.

    Vessel and wall stay as they are, and beside them nothing gets darker. None, and nothing is done, where
    too much of the place is one of them, or what is not is unlike the lesion's own background.
    """
    if not _alike(target[cover > _TOUCHED], cutout.background, width):
        return None
    wall = target > cutout.background + _WALL * width
    # A vessel that runs through a lesion is inside its outline.
    outline: NDArray[np.bool_] = mask & ndimage.binary_fill_holes(mask & ~wall[len(target) // 2])
    if outline.sum() < (1 - _ATTACHED) * mask.sum():
        return None
    beside = ndimage.binary_dilation(wall, np.ones((1, 3, 3), dtype=bool))
    blended = target + cover * (pixels - target)
    target[:] = np.where(beside, np.maximum(target, blended), blended)
    return outline


def _draw_zoom(
    mask: NDArray[np.bool_], zoom: tuple[float, float], generator: np.random.Generator
) -> float:
    """Draw a factor, small and large ones alike, that leaves the lesion wide enough to be seen."""
    low, high = zoom
    widest = max(np.ptp(np.flatnonzero(mask.any(axis=axes))) + 1 for axes in ((0, 1), (0, 2)))
    low = max(low, min(1.0, _LEAST_PIXELS / widest))
    return float(np.exp(generator.uniform(np.log(low), np.log(high)))) if low < high else low


def _zoomed(
    pixels: NDArray, cover: NDArray, mask: NDArray, factor: float
) -> tuple[NDArray, NDArray, NDArray]:
    size = tuple(max(1, round(length * factor)) for length in mask.shape)

    def sized(planes: NDArray) -> NDArray[np.float32]:
        tensor = torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32))[None]
        return functional.interpolate(tensor, size, mode="bilinear")[0].numpy()

    return sized(pixels), sized(cover), sized(mask[None])[0] >= 0.5


def _alike(values: NDArray, background: float, width: float) -> bool:
    if not -_DARKER * width <= float(np.median(values)) - background <= _BRIGHTER * width:
        return False
    return float((values > background + _WALL * width).mean()) <= _ATTACHED


def _turned(
    pixels: NDArray, cover: NDArray, mask: NDArray, turn: int
) -> tuple[NDArray, NDArray, NDArray]:
    """Return all three in one of the eight orientations of a slice."""
    quarter, mirrored = turn % 4, turn >= 4
    turned = [np.rot90(item, quarter, axes=(-2, -1)) for item in (pixels, cover, mask)]
    if mirrored:
        turned = [item[..., ::-1] for item in turned]
    return turned[0], turned[1], turned[2]
