"""Outline -> coverage: areas and volumes against geometry, inside against matplotlib."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Polygon

from medvision.sample.config import load_config
from medvision.sample.decoys import draw_decoy
from medvision.sample.lidc import Contour, Outline
from medvision.sample.nodules import core_coverage, deepest_mm
from medvision.sample.shapes import Shape, coverage, mask_of, outline_shape, polygon_distance

SPACING = (2.5, 0.703125, 0.703125)
VOXEL_MM3 = float(np.prod(SPACING))


def circle(radius: float, count: int = 90) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([100 + radius * np.cos(angle), 200 + radius * np.sin(angle)], axis=1)


def cylinder(radius_px: float, slices: int, pixel_mm: float, slice_mm: float) -> Outline:
    contours = tuple(Contour(circle(radius_px), i * slice_mm) for i in range(slices))
    return Outline(1, 5, contours, pixel_mm, slice_mm)


def ball(radius_mm: float, pixel_mm: float, slice_mm: float) -> Outline:
    heights = np.arange(-radius_mm + slice_mm / 2, radius_mm, slice_mm)
    radii = np.sqrt(radius_mm**2 - heights**2) / pixel_mm + 0.5
    contours = tuple(Contour(circle(r), float(z)) for z, r in zip(heights, radii, strict=True))
    return Outline(1, 5, contours, pixel_mm, slice_mm)


@given(
    radius=st.floats(3, 12),
    slices=st.integers(1, 6),
    pixel_mm=st.floats(0.5, 0.95),
    slice_mm=st.floats(0.6, 3.0),
    shift=st.tuples(*[st.floats(-0.5, 0.5)] * 3),
    sigma=st.sampled_from([0.0, 0.7]),
)
@settings(max_examples=12)
def test_coverage_keeps_the_volume(
    radius: float, slices: int, pixel_mm: float, slice_mm: float, shift: tuple, sigma: float
) -> None:
    shape = outline_shape(cylinder(radius, slices, pixel_mm, slice_mm), angle=0.3)
    alpha = coverage(shape, SPACING, tuple(np.multiply(shift, SPACING)), sigma)
    # The interior ends half a pixel inside the outline.
    area = np.pi * ((radius - 0.5) * pixel_mm) ** 2
    expected = area * slices * slice_mm
    sampling = SPACING[0] / 5  # a flat end falls between two of five samples a slice
    tolerance = 0.05 * expected + area * sampling
    assert alpha.sum() * VOXEL_MM3 == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("radius_mm", [2.5, 4.0, 8.0])
def test_a_ball_resampled_keeps_its_volume(radius_mm: float) -> None:
    outline = ball(radius_mm, 0.6, 1.0)
    alpha = coverage(outline_shape(outline), SPACING, psf_sigma_px=0.7)
    radii = [np.ptp(c.points[:, 0]) / 2 - 0.5 for c in outline.contours]
    expected = np.pi * np.square(np.multiply(radii, 0.6)).sum() * 1.0
    assert alpha.sum() * VOXEL_MM3 == pytest.approx(expected, rel=0.05)


def test_inside_agrees_with_matplotlib() -> None:
    rng = np.random.default_rng(3)
    polygon = circle(6, 17) * rng.uniform(0.95, 1.05, (17, 1)) - (100, 200)
    y, x = np.linspace(-25, 25, 61)[:, None], np.linspace(-18, 18, 53)[None, :]
    distance = polygon_distance(polygon, y, x)
    grid = np.stack(np.broadcast_arrays(x, y), axis=-1).reshape(-1, 2)
    inside = Polygon(polygon).contains_points(grid).reshape(distance.shape)
    clear = np.abs(distance) > 1e-6
    assert ((distance > 0) == inside)[clear].all()
    assert 0 < inside.sum() < inside.size


def test_distance_to_a_square_is_exact() -> None:
    square = np.array([[-2, -2], [2, -2], [2, 2], [-2, 2.0]])
    y, x = np.array([[0.0], [1.5], [5.0]]), np.array([[0.0, 6.0]])
    expected = [[2, -4], [0.5, -4], [-3, -5]]
    assert polygon_distance(square, y, x) == pytest.approx(np.array(expected))


def test_a_hole_is_left_out() -> None:
    ring = (Contour(circle(12), 0.0), Contour(circle(6), 0.0, is_hole=True))
    alpha = coverage(outline_shape(Outline(1, 5, ring, 0.7, 2.5)), SPACING)
    middle = [size // 2 for size in alpha.shape]
    assert alpha[tuple(middle)] == 0
    assert alpha.max() == 1


def test_pixels_on_the_outline_are_outside() -> None:
    square = np.array([[0, 0], [4, 0], [4, 4], [0, 4.0]])
    shape = outline_shape(Outline(1, 5, (Contour(square, 0.0),), 1.0, 1.0))
    alpha = coverage(shape, (1.0, 1.0, 1.0))
    inside = mask_of(alpha)
    assert inside.sum() == 9
    assert alpha.sum() == pytest.approx(9, rel=0.1)


@pytest.mark.parametrize("points", [[[5, 5]], [[5, 5], [6, 5]], [[5, 5], [6, 5], [6, 6], [5, 6]]])
def test_an_outline_without_interior_keeps_its_own_pixels(points: list) -> None:
    shape = outline_shape(Outline(1, 5, (Contour(np.array(points, float), 0.0),), 0.7, 2.5))
    assert mask_of(coverage(shape, SPACING, psf_sigma_px=0.7)).any()


def test_rotation_mirror_and_turning_over_move_the_shape_as_said() -> None:
    wedge = np.array([[0, 0], [20, 0], [20, 6], [0, 6.0]])
    wide = Contour(wedge, 0.0)
    narrow = Contour(np.array([[0, 0], [6, 0], [6, 6], [0, 6.0]]), 2.5)
    outline = Outline(1, 5, (wide, narrow), 0.703125, 2.5)
    plain = coverage(outline_shape(outline), SPACING)
    flat = plain.sum(axis=0)
    turned = coverage(outline_shape(outline, angle=np.pi / 2), SPACING).sum(axis=0)
    assert np.allclose(turned, np.flip(flat.T, axis=1), atol=0.05)
    mirrored = coverage(outline_shape(outline, mirror=True), SPACING)
    assert np.allclose(mirrored, plain[:, :, ::-1], atol=0.05)
    over = coverage(outline_shape(outline, upside_down=True), SPACING)
    assert np.allclose(over, plain[::-1], atol=0.05)
    assert not np.allclose(plain, plain[::-1], atol=0.05)


def test_shift_moves_the_centre_of_mass() -> None:
    shape = outline_shape(cylinder(5, 2, 0.7, 2.5))
    alpha = coverage(shape, SPACING, (0.6, -0.3, 0.2))
    places = np.meshgrid(*[np.arange(n) - n // 2 for n in alpha.shape], indexing="ij")
    center = [(alpha * p).sum() / alpha.sum() * s for p, s in zip(places, SPACING, strict=True)]
    # A slice is sampled five times, so a flat end may lie a quarter of a millimetre off.
    assert center[0] == pytest.approx(0.6, abs=0.26)
    assert center[1:] == pytest.approx([-0.3, 0.2], abs=0.02)


@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_a_core_is_so_much_of_the_diameter(fraction: float) -> None:
    shape = outline_shape(ball(8.0, 0.6, 1.0))
    assert deepest_mm(shape) == pytest.approx(8.0, abs=0.4)
    whole = coverage(shape, SPACING)
    core = core_coverage(shape, fraction, SPACING, (0, 0, 0), 0.0)
    assert core.shape == whole.shape
    middle = whole.shape[0] // 2
    ratio = np.sqrt(core[middle].sum() / whole[middle].sum())
    assert ratio == pytest.approx(fraction, abs=0.06)
    assert (core <= whole + 1e-6).all()


@pytest.mark.parametrize("kind", ["vessel", "scar", "calcified"])
@pytest.mark.parametrize("seed", range(4))
def test_decoys_are_whole_and_of_their_size(kind: str, seed: int) -> None:
    decoy = draw_decoy(kind, load_config().decoys, np.random.default_rng(seed))
    alpha = coverage(decoy.shape, SPACING)
    z, y, x = decoy.shape.half_extent_mm
    wider = coverage(Shape((z + 6, y + 6, x + 6), decoy.shape.distance), SPACING)
    assert alpha.sum() == pytest.approx(wider.sum(), rel=1e-3), "cut off at its window"
    extent = [np.ptp(axis) * s for axis, s in zip(np.nonzero(alpha > 0.1), SPACING, strict=True)]
    longest = float(np.linalg.norm(extent))
    if kind == "calcified":
        assert longest < 10
    else:
        assert longest > 6
