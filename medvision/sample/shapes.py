"""Shapes to put into a CT: signed distances in mm, and the coverage that a voxel grid sees of them.

A shape lies around the origin. Its ``distance(z, y, x)`` is positive inside and gives about the
in-plane distance to its surface, on the plane at height ``z`` (mm) for ``y[rows, 1]`` and
``x[1, columns]`` (mm); minus infinity where the plane misses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from medvision.sample.lidc import Contour, Outline

Distance = Callable[[float, NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]

_IN_PLANE_SAMPLES = 4
_SLICE_SAMPLES = 5


@dataclass(frozen=True)
class Shape:
    """A solid around the origin that ends within ``half_extent_mm`` (z, y, x)."""

    half_extent_mm: tuple[float, float, float]
    distance: Distance

    def shrink(self, by_mm: float) -> Shape:
        """Return the part at least ``by_mm`` below the surface."""
        return Shape(self.half_extent_mm, lambda z, y, x: self.distance(z, y, x) - by_mm)


def coverage(
    shape: Shape,
    spacing_mm: tuple[float, float, float],
    shift_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    psf_sigma_px: float = 0.0,
) -> NDArray[np.float32]:
    """Return the share 0..1 of every voxel that the shape fills, ``[slice, row, column]``.

    Every side is odd; the origin, moved by ``shift_mm``, lies at the centre of the middle voxel. A
    voxel is sampled 5 x 4 x 4 times; ``psf_sigma_px`` blurs in the plane as a scanner does.
    """
    from scipy.ndimage import gaussian_filter

    pads = (0, ceil(3 * psf_sigma_px), ceil(3 * psf_sigma_px))
    halves = [
        ceil((extent + abs(shift)) / step - 1e-6) + pad
        for extent, shift, step, pad in zip(
            shape.half_extent_mm, shift_mm, spacing_mm, pads, strict=True
        )
    ]
    y = _samples(halves[1], spacing_mm[1], _IN_PLANE_SAMPLES) - shift_mm[1]
    x = _samples(halves[2], spacing_mm[2], _IN_PLANE_SAMPLES) - shift_mm[2]
    heights = _samples(halves[0], spacing_mm[0], _SLICE_SAMPLES) - shift_mm[0]
    step = (spacing_mm[1] + spacing_mm[2]) / 2 / _IN_PLANE_SAMPLES
    planes = np.stack([_plane(shape, z, y, x, step) for z in heights])
    alpha = planes.reshape(-1, _SLICE_SAMPLES, *planes.shape[1:]).mean(axis=1)
    if psf_sigma_px > 0:
        alpha = gaussian_filter(alpha, (0, psf_sigma_px, psf_sigma_px), mode="constant")
    return np.clip(alpha, 0, 1).astype(np.float32)


def mask_of(alpha: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the voxels covered at least half as much as the best-covered one.

    That is the half of full coverage for all but the smallest; these would lose their rim, and with
    it most of their width, to the partial volume of a slice thicker than they are.
    """
    return alpha >= 0.5 * float(alpha.max())


def outline_shape(
    outline: Outline, angle: float = 0.0, mirror: bool = False, upside_down: bool = False
) -> Shape:
    """Turn a reader's outline into a shape around its middle, rotated in the plane by ``angle`` rad.

    Between contours the signed distances are interpolated; beyond the last ones the shape goes on
    for half a slice. The interior ends half a pixel inside the outline, which runs through the
    first pixels outside; an outline with no interior at all is taken with its own pixels.
    """
    planes = _contours_by_height(outline, angle, mirror)
    heights = np.array(sorted(planes))
    middle = (heights[0] + heights[-1]) / 2
    inset = outline.pixel_mm / 2
    if not any(_has_interior(c, outline.pixel_mm) for c in outline.contours if not c.is_hole):
        inset = -inset
    half = outline.slice_mm / 2
    sign = -1.0 if upside_down else 1.0

    def distance(z: float, y: NDArray, x: NDArray) -> NDArray:
        height = sign * z + middle
        if not heights[0] - half <= height <= heights[-1] + half:
            return np.full(np.broadcast_shapes(y.shape, x.shape), -np.inf)
        place = float(np.interp(height, heights, np.arange(heights.size)))
        below, above = heights[int(np.floor(place))], heights[int(np.ceil(place))]
        share = place % 1
        first = _cached_plane(planes, below, y, x, cache) - inset
        if share == 0:
            return first
        return (1 - share) * first + share * (_cached_plane(planes, above, y, x, cache) - inset)

    cache: dict[tuple[float, float, float, int], NDArray] = {}
    points = np.concatenate([p for plane in planes.values() for p, _ in plane])
    reach = np.abs(points).max(axis=0) + outline.pixel_mm
    extent = (float(heights[-1] - heights[0]) / 2 + half, float(reach[1]), float(reach[0]))
    return Shape(extent, distance)


def polygon_distance(
    polygon: NDArray[np.float64], y: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the signed distance to a closed polygon ``[n, 2]`` (x, y): positive inside, even-odd."""
    shape = np.broadcast_shapes(y.shape, x.shape)
    squared = np.full(shape, np.inf)
    inside = np.zeros(shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        dx, dy = x1 - x0, y1 - y0
        length = dx * dx + dy * dy
        along = np.zeros(shape) if length == 0 else ((x - x0) * dx + (y - y0) * dy) / length
        along = np.clip(along, 0, 1)
        np.minimum(squared, (x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2, out=squared)
        if dy != 0:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * dx / dy)
    return np.where(inside, 1.0, -1.0) * np.sqrt(squared)


Plane = list[tuple[NDArray[np.float64], bool]]


def _contours_by_height(outline: Outline, angle: float, mirror: bool) -> dict[float, Plane]:
    """Polygons (x, y) in mm around the middle, with their hole flag, by slice."""
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.array([[cosine, -sine], [sine, cosine]]) @ np.diag([-1.0 if mirror else 1.0, 1.0])
    planes: dict[float, Plane] = {}
    for contour in outline.contours:
        points = contour.points * outline.pixel_mm - outline.center_mm[:2]
        planes.setdefault(contour.z_mm, []).append((points @ turn.T, contour.is_hole))
    return planes


def _cached_plane(
    planes: dict[float, Plane],
    height: float,
    y: NDArray,
    x: NDArray,
    cache: dict[tuple[float, float, float, int], NDArray],
) -> NDArray:
    key = (height, float(y.flat[0]), float(x.flat[0]), x.size)
    if key not in cache:
        cache[key] = _plane_distance(planes[height], y, x)
    return cache[key]


def _plane_distance(plane: Plane, y: NDArray, x: NDArray) -> NDArray:
    result = np.full(np.broadcast_shapes(y.shape, x.shape), -1e3)
    for points, is_hole in plane:
        if not is_hole:
            result = np.maximum(result, polygon_distance(points, y, x))
    for points, is_hole in plane:
        if is_hole:
            result = np.minimum(result, -polygon_distance(points, y, x))
    return result


def _has_interior(contour: Contour, pixel_mm: float) -> bool:
    """Tell whether any pixel lies strictly inside the outline."""
    low = contour.points.min(axis=0)
    high = contour.points.max(axis=0)
    x = np.arange(low[0], high[0] + 1)[None, :]
    y = np.arange(low[1], high[1] + 1)[:, None]
    return bool((polygon_distance(contour.points, y, x) > 0.25).any())


def _samples(half: int, step: float, count: int) -> NDArray[np.float64]:
    """Places of ``count`` samples in each of ``2 * half + 1`` voxels around 0, in mm."""
    total = (2 * half + 1) * count
    return ((np.arange(total) + 0.5) / count - half - 0.5) * step


def _plane(shape: Shape, z: float, y: NDArray, x: NDArray, step: float) -> NDArray:
    """Coverage of one plane's voxels; a sample on the surface counts by its distance to it."""
    distance = shape.distance(float(z), y[:, None], x[None, :])
    samples = np.clip(distance / step + 0.5, 0, 1)
    rows, columns = y.size // _IN_PLANE_SAMPLES, x.size // _IN_PLANE_SAMPLES
    return samples.reshape(rows, _IN_PLANE_SAMPLES, columns, _IN_PLANE_SAMPLES).mean(axis=(1, 3))
