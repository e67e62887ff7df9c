"""Diameters and volumes against hand counts, brute force and analytic bodies."""

from __future__ import annotations

from math import pi, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from medvision.errors import InputError
from medvision.findings.measure import (
    box_diameter_mm,
    box_volume_mm3,
    ellipse_in_box,
    ellipsoid_in_box,
    mask_diameter_mm,
    mask_volume_mm3,
    measure,
)
from medvision.geometry import Box, make_affine
from medvision.scans.volume import Volume


def affine_of(spacing=(1.0, 1.0, 1.0), angles=(0, 0, 0)):
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    return make_affine((5, 6, 7), *turn, spacing)


def brute_force(mask, affine):
    best = 0.0
    for plane in mask:
        middles = [
            affine[:3, 1:3] @ np.add(pixel, step)
            for pixel in np.argwhere(plane)
            for step in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5))
        ]
        for point in middles:
            best = max(best, *np.linalg.norm(np.array(middles) - point, axis=1).tolist())
    return best


@pytest.mark.parametrize("angles", [(0, 0, 0), (30, 40, -20)])
def test_rectangles_by_hand(angles):
    affine = affine_of((9, 0.5, 2.0), angles)
    one = np.ones((1, 1, 1), bool)
    assert mask_diameter_mm(one, affine) == pytest.approx(2.0)
    row = np.ones((1, 1, 5), bool)
    assert mask_diameter_mm(row, affine) == pytest.approx(10.0)
    column = np.ones((4, 8, 1), bool)
    assert mask_diameter_mm(column, affine) == pytest.approx(sqrt((7 * 0.5) ** 2 + 2**2))
    block = np.ones((1, 7, 3), bool)  # widest: half an edge in from two opposite corners
    assert mask_diameter_mm(block, affine) == pytest.approx(sqrt((6 * 0.5) ** 2 + 6**2))


@pytest.mark.parametrize("diameter", [6.0, 10.0, 25.0])
@pytest.mark.parametrize("spacing", [(2.0, 0.5, 0.5), (5.0, 0.4, 0.9)])
def test_a_disc_measures_its_diameter_within_a_pixel(diameter, spacing):
    affine = affine_of(spacing, (10, 20, 30))
    rows, columns = np.ogrid[0:80, 0:80]
    disc = ((rows - 40.3) * spacing[1]) ** 2 + ((columns - 39.8) * spacing[2]) ** 2
    mask = (disc <= (diameter / 2) ** 2)[None]
    assert mask_diameter_mm(mask, affine) == pytest.approx(diameter, abs=max(spacing[1:]))


@settings(max_examples=40, deadline=None)
@given(
    mask=hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)),
    angles=st.tuples(*[st.integers(-180, 180)] * 3),
)
def test_diameter_is_that_of_all_pairs(mask, angles):
    affine = affine_of((3, 0.7, 1.3), angles)
    assert mask_diameter_mm(mask, affine) == pytest.approx(brute_force(mask, affine))


def test_a_large_outline_goes_through_the_hull_and_agrees():
    mask = np.random.default_rng(1).random((2, 30, 25)) < 0.2
    affine = affine_of((3, 0.7, 1.3), (15, 25, 35))
    assert mask_diameter_mm(mask, affine) == pytest.approx(brute_force(mask, affine))


def test_the_widest_slice_counts_and_slices_do_not_add_up():
    mask = np.zeros((20, 5, 5), bool)
    mask[:, 2, 2] = True
    mask[7, 2, 1:4] = True
    assert mask_diameter_mm(mask, affine_of((10, 1, 1))) == pytest.approx(3.0)


def test_an_empty_mask_has_no_size():
    empty = np.zeros((2, 3, 4), bool)
    assert mask_diameter_mm(empty, affine_of()) == 0
    assert mask_volume_mm3(empty, affine_of()) == 0


def test_box_diameter_is_the_longer_side_in_the_plane():
    affine = affine_of((100, 0.5, 2.0), (10, 20, 30))
    assert box_diameter_mm(Box(0, 0, 0, 9, 8, 3), affine) == pytest.approx(6.0)
    assert box_diameter_mm(Box(0, 0, 0, 9, 20, 3), affine) == pytest.approx(10.0)


def test_volumes_by_hand():
    affine = affine_of((2, 0.5, 3), (40, 50, 60))
    mask = np.zeros((3, 3, 3), bool)
    mask[0, 0, :2] = mask[2, 2, 2] = True
    assert mask_volume_mm3(mask, affine) == pytest.approx(3 * 3.0)
    assert box_volume_mm3(Box(0, 0, 0, 2, 4, 1), affine) == pytest.approx(pi / 6 * 4 * 2 * 3)


def test_ellipsoid_of_a_box_holds_the_volume_that_is_reported():
    affine = affine_of((1, 1, 1))
    box = Box(0.2, 0.4, 0.1, 20.3, 30.7, 24.9)
    mask = ellipsoid_in_box(box, (21, 31, 25))
    assert mask_volume_mm3(mask, affine) == pytest.approx(box_volume_mm3(box, affine), rel=0.02)


@given(
    low=st.tuples(*[st.floats(0, 8)] * 2),
    size=st.tuples(*[st.floats(0.01, 4)] * 2),
)
def test_an_ellipse_is_never_empty_and_stays_in_its_box(low, size):
    mask = ellipse_in_box((12, 12), *low, *(np.add(low, size)).tolist())
    rows, columns = np.nonzero(mask)
    assert len(rows)
    for found, start, length in ((rows, low[0], size[0]), (columns, low[1], size[1])):
        assert found.min() + 1 > start
        assert found.max() < start + length


def test_measure_takes_the_mask_and_else_the_ellipsoid():
    array = np.zeros((4, 6, 8), np.int16)
    array[1, 2, 3:5] = 100
    volume = Volume(array, affine_of((2, 1, 1)))
    box = Box(1, 2, 3, 2, 3, 6)
    masked = measure(volume, box, np.array([[[True, True, False]]]))
    assert (masked.diameter_mm, masked.volume_mm3, masked.mean_hu) == pytest.approx((2, 4, 100))
    bare = measure(volume, box)
    assert (bare.diameter_mm, bare.volume_mm3) == pytest.approx((3, pi / 6 * 6))
    assert bare.mean_hu == pytest.approx(200 / 3)
    assert measure(volume, box, np.zeros((1, 1, 3), bool)) == bare


def test_measure_cuts_a_box_at_the_edge_and_refuses_one_outside():
    volume = Volume(np.full((4, 6, 8), 7.0), affine_of())
    assert measure(volume, Box(-3, -3, -3, 2, 2, 2)).mean_hu == pytest.approx(7)
    with pytest.raises(InputError, match="inside the scan"):
        measure(volume, Box(4, 0, 0, 5, 1, 1))
    with pytest.raises(InputError, match="fill its box"):
        measure(volume, Box(0, 0, 0, 1, 1, 1), np.ones((1, 1, 2), bool))
