"""What a nodule is made of: HU by texture class, with the CT's own noise, and how it is blended in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.sample.config import DensityConfig, Range
from medvision.sample.shapes import Shape, coverage

Hu = NDArray[np.float32]

_VISIBLE_HU = 120.0
"""Least rise over the lung around: readers saw these nodules, partial volume or not."""


def blend(base: Hu, alpha: Hu, content: Hu) -> Hu:
    """Return ``base`` with ``content`` put over it as far as ``alpha`` (0..1) covers each voxel."""
    return ((1 - alpha) * base + alpha * content).astype(np.float32)


def low_frequency(
    shape: tuple[int, ...], rng: np.random.Generator, sigma_px: float = 2.5
) -> NDArray[np.float64]:
    """Return a smooth random field of mean 0 and standard deviation about 1."""
    from scipy.ndimage import gaussian_filter

    field = rng.standard_normal(shape)
    sigma = (sigma_px / 3, sigma_px, sigma_px)
    smooth = gaussian_filter(field, sigma, mode="wrap")
    deviation = float(smooth.std())
    return smooth / deviation if deviation > 0 else smooth


def solid_content(noise: Hu, mean_hu: float, texture_hu: float, rng: np.random.Generator) -> Hu:
    """Return soft tissue of ``mean_hu`` with a smooth texture and the CT's noise at that place."""
    texture = texture_hu * low_frequency(noise.shape, rng)
    return (mean_hu + texture + noise).astype(np.float32)


def ground_glass_content(
    base: Hu, alpha: Hu, mean_hu: float, texture: float, rng: np.random.Generator
) -> Hu:
    """Return the lung at that place, denser, so that its mean comes to about ``mean_hu``.

    What is added fades to nothing where the lung is already as dense as water: vessels stay visible.
    """
    ground = float(np.median(base[alpha >= min(0.5, float(alpha.max()))]))
    added = max(mean_hu - ground, _VISIBLE_HU / max(float(alpha.max()), 0.1))
    room = np.clip(-base / max(-ground, 1.0), 0, 1.3)
    factor = 1 + texture * np.clip(low_frequency(base.shape, rng), -2, 2)
    return (base + added * room * factor).astype(np.float32)


def draw(limits: Range | tuple[float, float], rng: np.random.Generator) -> float:
    """Draw evenly from a range."""
    return float(rng.uniform(*limits))


def insert_nodule(
    class_name: str,
    base: Hu,
    alpha: Hu,
    core: Hu,
    noise: Hu,
    density: DensityConfig,
    rng: np.random.Generator,
) -> Hu:
    """Return ``base`` with a nodule of a class in it; ``core`` covers a part-solid one's solid part.

    All arrays share one shape. Raises InputError for a class the sample does not know.
    """
    solid = solid_content(noise, draw(density.solid_hu, rng), density.solid_texture_hu, rng)
    if class_name == "solid":
        return blend(base, alpha, solid)
    glass_hu = draw(density.ground_glass_hu, rng)
    glass = ground_glass_content(base, alpha, glass_hu, density.ground_glass_texture, rng)
    if class_name == "ground_glass":
        return blend(base, alpha, glass)
    if class_name == "part_solid":
        return blend(blend(base, alpha, glass), core, solid)
    raise InputError(f"A nodule is ground_glass, part_solid or solid; got {class_name!r}.")


def core_coverage(
    shape: Shape,
    fraction: float,
    spacing_mm: tuple[float, float, float],
    shift_mm: tuple[float, float, float],
    psf_sigma_px: float,
) -> Hu:
    """Return the coverage of the innermost part, ``fraction`` of the shape's diameter across."""
    depth = deepest_mm(shape)
    return coverage(shape.shrink((1 - fraction) * depth), spacing_mm, shift_mm, psf_sigma_px)


def deepest_mm(shape: Shape) -> float:
    """Return the largest in-plane distance from inside the shape to its surface."""
    z_reach, y_reach, x_reach = shape.half_extent_mm
    y = np.arange(-y_reach, y_reach, 0.35)[:, None]
    x = np.arange(-x_reach, x_reach, 0.35)[None, :]
    heights = np.linspace(-0.99 * z_reach, 0.99 * z_reach, 9)
    return max(float(shape.distance(float(z), y, x).max()) for z in heights)
