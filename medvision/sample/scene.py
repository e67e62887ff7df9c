"""Scene: a piece of the CT that lesions and decoys are put into, never two in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medvision.geometry import Box
from medvision.sample.config import PlacementConfig
from medvision.sample.lungs import Chest, Lung
from medvision.sample.shapes import mask_of

Window = tuple[slice, slice, slice]

_TOUCHED = 0.02
"""A voxel covered by less is not counted as changed."""


@dataclass
class Scene:
    """The voxels of ``box`` in float HU, as found (``base``) and as changed so far (``hu``).

    ``occupied`` marks what is taken, with the gap that must stay around it.
    """

    base: NDArray[np.float32]
    noise: NDArray[np.float32]
    lung: NDArray[np.bool_]
    spacing_mm: tuple[float, float, float]
    hu: NDArray[np.float32] = field(init=False)
    occupied: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.hu = self.base.copy()
        self.occupied = np.zeros(self.base.shape, dtype=bool)

    def occupy(self, window: Window, touched: NDArray[np.bool_], gap_mm: float) -> None:
        """Take the touched voxels of a window and all within ``gap_mm`` of them."""
        from scipy.ndimage import binary_dilation

        ball = _ball(gap_mm, self.spacing_mm)
        pads = [size // 2 for size in ball.shape]
        grown = binary_dilation(np.pad(touched, [(pad, pad) for pad in pads]), ball)
        for axis, (span, pad) in enumerate(zip(window, pads, strict=True)):
            low, high = span.start - pad, span.stop + pad
            keep = slice(max(0, -low), grown.shape[axis] - max(0, high - self.base.shape[axis]))
            grown = grown[(slice(None),) * axis + (keep,)]
        spans = zip(window, pads, strict=True)
        self.occupied[tuple(slice(max(0, s.start - p), s.stop + p) for s, p in spans)] |= grown


def open_scene(chest: Chest, lung: Lung, box: Box) -> Scene:
    """Cut the voxels of an integer ``box`` out of the CT; only ``lung`` may be filled."""
    window = box.slices
    return Scene(
        chest.volume.array[window].astype(np.float32),
        chest.noise_hu[window],
        lung.core[window],
        chest.volume.spacing_mm,
    )


def find_place(
    scene: Scene,
    alpha: NDArray[np.float32],
    placement: PlacementConfig,
    rng: np.random.Generator,
    *,
    in_parenchyma: bool,
) -> Window | None:
    """Draw a free window for ``alpha`` whose centre and most of whose mask lie in the lung.

    With ``in_parenchyma`` the lung there must hold air and few vessels; what counts as few is
    doubled after half the attempts. Returns None if every attempt fails.
    """
    halves = [size // 2 for size in alpha.shape]
    inner = tuple(
        slice(half, size - half) for half, size in zip(halves, scene.lung.shape, strict=True)
    )
    centers = np.flatnonzero(scene.lung[inner])
    if not centers.size:
        return None
    mask = mask_of(alpha)
    for attempt in range(placement.attempts):
        corner = np.unravel_index(rng.choice(centers), scene.lung[inner].shape)
        window = _window(corner, alpha.shape)
        leniency = 1 if attempt < placement.attempts // 2 else 2
        if not _is_free(scene, window, alpha, mask, placement):
            continue
        if not in_parenchyma or _is_parenchyma(scene.base[window][mask], placement, leniency):
            return window
    return None


def _window(corner: Sequence[np.intp], size: tuple[int, ...]) -> Window:
    z, y, x = (slice(int(low), int(low) + n) for low, n in zip(corner, size, strict=True))
    return (z, y, x)


def _is_free(
    scene: Scene,
    window: Window,
    alpha: NDArray[np.float32],
    mask: NDArray[np.bool_],
    placement: PlacementConfig,
) -> bool:
    if scene.occupied[window][alpha > _TOUCHED].any():
        return False
    return bool(scene.lung[window][mask].mean() >= placement.min_inside)


def _is_parenchyma(hu: NDArray[np.float32], placement: PlacementConfig, leniency: int) -> bool:
    vessels = float((hu > placement.vessel_hu).mean())
    return bool(
        hu.mean() <= placement.max_mean_hu and vessels <= leniency * placement.max_vessel_fraction
    )


def touched_by(alpha: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the voxels that blending with ``alpha`` visibly changes."""
    return alpha > _TOUCHED


def _ball(radius_mm: float, spacing_mm: tuple[float, float, float]) -> NDArray[np.bool_]:
    steps = [np.arange(-int(radius_mm / s), int(radius_mm / s) + 1) * s for s in spacing_mm]
    z, y, x = np.meshgrid(*steps, indexing="ij")
    return z**2 + y**2 + x**2 <= radius_mm**2 + 1e-9
