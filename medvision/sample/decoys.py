"""Decoys: vessel-like, scar-like and calcified structures that look a little like a nodule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.sample.config import DecoyConfig
from medvision.sample.nodules import draw
from medvision.sample.shapes import Shape

_STEP_MM = 0.5
_FLAT_COSINE = 0.5
"""Largest cosine between a plate's normal and the slice direction."""


@dataclass(frozen=True)
class Decoy:
    """A shape with what fills it: its mean HU and the spread of its smooth texture, in HU."""

    kind: str
    shape: Shape
    mean_hu: float
    texture_hu: float


def draw_decoy(kind: str, config: DecoyConfig, rng: np.random.Generator) -> Decoy:
    """Make a decoy of kind vessel, scar or calcified; InputError for another."""
    if kind == "vessel":
        return Decoy(kind, vessel_shape(config, rng), draw(config.vessel_hu, rng), 15.0)
    if kind == "scar":
        return Decoy(kind, scar_shape(config, rng), draw(config.scar_hu, rng), 30.0)
    if kind == "calcified":
        return Decoy(kind, speck_shape(config, rng), draw(config.calcified_hu, rng), 60.0)
    raise InputError(f"A drawn decoy is vessel, scar or calcified; got {kind!r}.")


def vessel_shape(config: DecoyConfig, rng: np.random.Generator) -> Shape:
    """Make a curved tube that tapers and fades at its ends, sometimes with a branch, in any direction."""
    length = draw(config.vessel_length_mm, rng)
    radius = draw(config.vessel_diameter_mm, rng) / 2
    start = _direction(rng)
    path = _curve(np.zeros(3), start, length, rng)
    radii = radius * np.linspace(1.0, 0.6, len(path))
    if rng.random() < config.branch_probability:
        fork = int(rng.uniform(0.3, 0.6) * len(path))
        heading = path[fork] - path[fork - 1]
        heading = heading / np.linalg.norm(heading) + rng.normal(0, 0.6, 3)
        branch = _curve(path[fork], heading, length * rng.uniform(0.4, 0.6), rng)
        path = np.concatenate([path, branch])
        radii = np.concatenate([radii, np.linspace(0.75 * radii[fork], 0.4 * radius, len(branch))])
    path -= (path.min(axis=0) + path.max(axis=0)) / 2
    return _tube(path, radii)


def scar_shape(config: DecoyConfig, rng: np.random.Generator) -> Shape:
    """Make a thin, wavy plate with a ragged rim, steep to the slices; the narrow ones are bands.

    A flat-lying plate would show on one thick slice as a patch of ground glass: nobody could tell.
    """
    thickness = draw(config.scar_thickness_mm, rng)
    length = draw(config.scar_length_mm, rng) / 2
    width = max(length * rng.uniform(0.2, 0.8), 2.0)
    frame = _frame(_direction(rng), rng)
    while abs(frame[2, 0]) > _FLAT_COSINE:
        frame = _frame(_direction(rng), rng)
    waves = np.clip(rng.normal(0, 1, 2), -1.5, 1.5)
    wobble = rng.uniform(0, 2 * np.pi, 4)

    def distance(z: float, y: NDArray, x: NDArray) -> NDArray:
        planes = (axis[0] * z + axis[1] * y + axis[2] * x for axis in frame)
        # Single precision halves the time of the most costly lines of the sample.
        u, v, w = (plane.astype(np.float32) for plane in planes)
        bend = waves[0] * np.sin(2.2 * u / length + wobble[0]) + waves[1] * np.sin(
            v / 3 + wobble[1]
        )
        angle = np.arctan2(v / width, u / length)
        rim = 1 + 0.15 * np.sin(3 * angle + wobble[2]) + 0.1 * np.sin(7 * angle + wobble[3])
        radial = np.hypot(u / length, v / width) / rim
        # The plate thins out towards its rim: a scar has no cut edge.
        return (
            thickness / 2 * np.sqrt(np.clip(1 - radial**2, 0, 1))
            - np.abs(w - bend)
            - (np.clip(radial - 1, 0, None) * width)
        )

    reach = np.abs(frame).T @ np.array([1.25 * length, 1.25 * width, thickness / 2 + 3])
    return Shape((float(reach[0]), float(reach[1]), float(reach[2])), distance)


def speck_shape(config: DecoyConfig, rng: np.random.Generator) -> Shape:
    """Make a small ellipsoid with a bumpy surface."""
    semi = draw(config.calcified_diameter_mm, rng) / 2 * rng.uniform(0.75, 1.0, 3)
    phase = rng.uniform(0, 2 * np.pi, 2)

    def distance(z: float, y: NDArray, x: NDArray) -> NDArray:
        radial = np.sqrt((z / semi[0]) ** 2 + (y / semi[1]) ** 2 + (x / semi[2]) ** 2)
        bump = (
            1 + 0.12 * np.sin(3 * np.arctan2(y, x) + phase[0] + z) + 0.05 * np.sin(phase[1] + 4 * z)
        )
        return (bump - radial) * float(semi.min())

    reach = 1.25 * semi
    return Shape((float(reach[0]), float(reach[1]), float(reach[2])), distance)


def _tube(path: NDArray, radii: NDArray) -> Shape:
    from scipy.spatial import KDTree

    widest = float(radii.max())
    tree = KDTree(path)
    reach = np.abs(path).max(axis=0) + widest

    def distance(z: float, y: NDArray, x: NDArray) -> NDArray:
        result = np.full(np.broadcast_shapes(y.shape, x.shape), -np.inf)
        near = path[np.abs(path[:, 0] - z) <= widest]
        if not len(near):
            return result
        rows = np.flatnonzero(_between(y.ravel(), near[:, 1], widest))
        columns = np.flatnonzero(_between(x.ravel(), near[:, 2], widest))
        window = np.ix_(rows, columns)
        grid_y, grid_x = np.meshgrid(y.ravel()[rows], x.ravel()[columns], indexing="ij")
        points = np.stack([np.full_like(grid_y, z), grid_y, grid_x], axis=-1)
        nearest, index = tree.query(points, distance_upper_bound=1.5 * widest)
        result[window] = np.append(radii, 0.0)[index] - nearest
        return result

    return Shape((float(reach[0]), float(reach[1]), float(reach[2])), distance)


def _between(values: NDArray, places: NDArray, margin: float) -> NDArray[np.bool_]:
    return (values >= places.min() - 1.5 * margin) & (values <= places.max() + 1.5 * margin)


def _curve(start: NDArray, heading: NDArray, length: float, rng: np.random.Generator) -> NDArray:
    """Walk ``length`` mm from ``start`` in (z, y, x), turning smoothly."""
    turn = rng.normal(0, 1.0, 3)
    points = [start]
    for _ in range(max(int(length / _STEP_MM), 2)):
        heading = heading / np.linalg.norm(heading)
        turn = 0.9 * turn + rng.normal(0, 0.35, 3)
        heading = heading + 0.035 * turn
        points.append(points[-1] + _STEP_MM * heading / np.linalg.norm(heading))
    return np.array(points)


def _direction(rng: np.random.Generator) -> NDArray[np.float64]:
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _frame(first: NDArray, rng: np.random.Generator) -> NDArray[np.float64]:
    """Three orthogonal unit vectors (rows), each as (z, y, x)."""
    second = np.cross(first, _direction(rng))
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)])
