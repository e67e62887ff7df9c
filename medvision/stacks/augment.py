"""Training augmentation: one call moves all slices of a stack and the label map together.

The only file that imports albumentations. Boxes are never transformed: they are recomputed from the
transformed label map, so they stay tight whatever the transform was.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

# albumentations asks a server for its newest version when imported; a medical tool opens no sockets.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"


class AugmentConfig(BaseModel):
    """What is varied in training. Each ``*_p`` is the share of samples it is applied to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(True, description="off: crops are used as they are")
    dihedral: bool = Field(True, description="the eight flips and quarter turns of a slice")
    affine_p: float = Field(0.5, ge=0, le=1, description="share rotated and scaled")
    rotate_degrees: float = Field(20.0, ge=0, le=180, description="largest rotation, degrees")
    scale: tuple[float, float] = Field((0.85, 1.2), description="smallest and largest zoom")
    intensity_p: float = Field(
        0.3, ge=0, le=1, description="share with brightness and contrast moved"
    )
    brightness: float = Field(0.04, ge=0, le=1, description="largest shift, in window widths")
    contrast: float = Field(0.1, ge=0, le=1, description="largest relative change of contrast")
    noise_p: float = Field(0.2, ge=0, le=1, description="share with Gaussian noise added")
    noise: float = Field(0.02, ge=0, le=1, description="largest noise deviation, in window widths")
    reverse_slices_p: float = Field(0.5, ge=0, le=1, description="share seen from the other end")


class Augmenter:
    """Draws and applies one random transform to a stack and its label map."""

    def __init__(self, config: AugmentConfig, size: int) -> None:
        """Build the transforms for crops that end as ``size`` x ``size`` pixels."""
        import albumentations

        self.config = config
        self._compose = albumentations.Compose(_transforms(albumentations, config, size))

    def __call__(
        self, stack: NDArray[np.float32], labels: NDArray[np.integer], seed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return ``stack[channel, row, column]`` and ``labels[row, column]`` transformed alike.

        The same ``seed`` draws the same transform. Labels must be in 0..255.
        """
        self._reseed(seed)
        if (
            self.config.enabled
            and np.random.default_rng(seed).random() < self.config.reverse_slices_p
        ):
            stack = stack[::-1]
        image = np.ascontiguousarray(stack.transpose(1, 2, 0))
        result = self._compose(image=image, mask=labels.astype(np.uint8))
        moved = np.clip(result["image"], 0.0, 1.0).astype(np.float32, copy=False)
        return np.ascontiguousarray(moved.transpose(2, 0, 1)), result["mask"]

    def _reseed(self, seed: int) -> None:
        """Give every transform a stream of its own.

        ``Compose.set_random_seed`` gives all of them the same one: whether and how far each moves is
        then one and the same draw, noise only ever on top of a changed brightness.
        """
        parts = np.random.SeedSequence(seed).generate_state(len(self._compose.transforms))
        for transform, part in zip(self._compose.transforms, parts.tolist(), strict=True):
            transform.set_random_seed(part)


def _transforms(library: Any, config: AugmentConfig, size: int) -> list[Any]:
    crop = library.CenterCrop(size, size, pad_if_needed=True)
    if not config.enabled:
        return [crop]
    import cv2

    affine = library.Affine(
        scale=config.scale,
        rotate=(-config.rotate_degrees, config.rotate_degrees),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST,
        p=config.affine_p,
    )
    intensity = library.RandomBrightnessContrast(
        brightness_limit=config.brightness, contrast_limit=config.contrast, p=config.intensity_p
    )
    noise = library.GaussNoise(std_range=(0.0, config.noise), p=config.noise_p)
    turns = [library.D4(p=1.0)] if config.dihedral else []
    return [*turns, affine, crop, intensity, noise]


def boxes_from_labels(labels: NDArray[np.integer]) -> dict[int, tuple[int, int, int, int]]:
    """Return for each value above 0 of ``labels[row, column]`` its tight ``x1, y1, x2, y2``.

    Half-open pixel edges with x = column, as torchvision has them.
    """
    from scipy.ndimage import find_objects

    found = find_objects(labels)
    return {
        value: (where[1].start, where[0].start, where[1].stop, where[0].stop)
        for value, where in enumerate(found, start=1)
        if where is not None
    }
