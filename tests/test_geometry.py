"""Geometry laws, judged by SimpleITK and nibabel."""

import math
from itertools import product

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from medvision import geometry
from medvision.errors import InputError
from medvision.geometry import Box

angles = st.floats(-math.pi, math.pi)
spacings = st.tuples(*[st.floats(0.05, 12.0)] * 3)
origins = st.tuples(*[st.floats(-2000, 2000)] * 3)
signs = st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3)
permutations = st.permutations([0, 1, 2])
points = st.tuples(*[st.floats(-50, 600)] * 3)


def rotation(a, b, c):
    about_x = [[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]]
    about_y = [[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]]
    about_z = [[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]]
    return np.array(about_x) @ np.array(about_y) @ np.array(about_z)


@st.composite
def affines(draw):
    """Any scan: oblique, flipped, axes permuted, anisotropic, far from the origin."""
    directions = rotation(draw(angles), draw(angles), draw(angles))
    directions = directions[:, draw(permutations)] * draw(signs)
    slices, rows, columns = directions.T
    return geometry.make_affine(draw(origins), slices, rows, columns, draw(spacings))


def itk_image_on(affine, shape=(2, 3, 4)):
    image = SimpleITK.Image([shape[2], shape[1], shape[0]], SimpleITK.sitkUInt8)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetSpacing(geometry.spacing_of(affine)[::-1])
    image.SetDirection(geometry.directions_of(affine)[:, ::-1].ravel().tolist())
    return image


@settings(max_examples=60, deadline=None)
@given(affines(), points)
def test_index_to_mm_and_back(affine, point):
    there = geometry.index_to_patient(affine, point)
    back = geometry.patient_to_index(affine, there)
    spacing = np.array(geometry.spacing_of(affine))
    assert np.abs((back - point) * spacing).max() < 1e-3


@settings(max_examples=60, deadline=None)
@given(affines(), points)
def test_same_point_as_simpleitk(affine, point):
    expected = itk_image_on(affine).TransformContinuousIndexToPhysicalPoint(point[::-1])
    assert geometry.index_to_patient(affine, point) == pytest.approx(expected, abs=1e-6)


def test_whole_index_same_as_simpleitk():
    affine = geometry.make_affine((5, -7, 90), *rotation(0.5, 0.2, -1).T, (2.5, 0.8, 0.7))
    for index in product(range(2), range(3), range(4)):
        expected = itk_image_on(affine).TransformIndexToPhysicalPoint(index[::-1])
        assert geometry.index_to_patient(affine, index) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(affines())
def test_nifti_affine_round_trip(affine):
    back = geometry.affine_from_nifti(geometry.affine_to_nifti(affine))
    assert np.abs(back - affine).max() < 1e-9


@settings(max_examples=40, deadline=None)
@given(affines(), points)
def test_nifti_affine_means_the_same_point_in_ras(affine, point):
    image = nibabel.Nifti1Image(np.zeros((4, 3, 2), np.uint8), geometry.affine_to_nifti(affine))
    ras = nibabel.affines.apply_affine(image.affine, point[::-1])
    lps = geometry.index_to_patient(affine, point)
    assert lps == pytest.approx(ras * [-1, -1, 1], abs=1e-6)


def test_nifti_axis_codes_of_an_axial_scan():
    axial = geometry.make_affine((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (5, 1, 1))
    assert nibabel.aff2axcodes(geometry.affine_to_nifti(axial)) == ("L", "P", "S")


def test_points_keep_their_shape():
    affine = geometry.make_affine((1, 2, 3), (0, 0, 1), (0, 1, 0), (1, 0, 0), (5, 2, 1))
    many = np.random.default_rng(0).uniform(0, 9, (4, 5, 3))
    mm = geometry.index_to_patient(affine, many)
    assert mm.shape == many.shape
    assert geometry.patient_to_index(affine, mm) == pytest.approx(many)


@settings(max_examples=40, deadline=None)
@given(affines(), st.tuples(*[st.integers(0, 20)] * 3), st.tuples(*[st.integers(1, 15)] * 3))
def test_box_in_mm_holds_every_voxel_corner(affine, start, size):
    box = Box(*start, *np.add(start, size).tolist())
    mm = geometry.box_to_patient(affine, box)
    ends = [(low - 0.5, low + length - 0.5) for low, length in zip(start, size, strict=True)]
    corners = geometry.index_to_patient(affine, list(product(*ends)))
    low = [mm.x_min_mm, mm.y_min_mm, mm.z_min_mm]
    high = [mm.x_max_mm, mm.y_max_mm, mm.z_max_mm]
    assert (corners >= np.array(low) - 1e-6).all()
    assert (corners <= np.array(high) + 1e-6).all()
    assert np.ptp(corners, axis=0) == pytest.approx(np.subtract(high, low), abs=1e-6)


def test_box_of_a_scan_turned_by_30_degrees_has_the_volume_of_all_eight_corners():
    turn = rotation(0, 0, math.radians(30))
    affine = geometry.make_affine(
        (0, 0, 0), turn @ [0, 0, 1], turn @ [0, 1, 0], turn @ [1, 0, 0], (1, 1, 1)
    )
    mm = geometry.box_to_patient(affine, Box(0, 0, 0, 10, 10, 10))
    width = 10 * (math.cos(math.radians(30)) + math.sin(math.radians(30)))
    assert mm.x_max_mm - mm.x_min_mm == pytest.approx(width)
    assert mm.y_max_mm - mm.y_min_mm == pytest.approx(width)
    assert mm.z_max_mm - mm.z_min_mm == pytest.approx(10)


def test_box_edges_lie_half_a_voxel_outside_the_centres():
    affine = geometry.make_affine((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (4, 2, 1))
    mm = geometry.box_to_patient(affine, Box(0, 0, 0, 1, 1, 1))
    assert (mm.x_min_mm, mm.x_max_mm) == (-0.5, 0.5)
    assert (mm.y_min_mm, mm.y_max_mm) == (-1, 1)
    assert (mm.z_min_mm, mm.z_max_mm) == (-2, 2)


@pytest.mark.parametrize(
    "edges",
    [(0, 0, 0, 0, 1, 1), (0, 2, 0, 1, 1, 1), (0, 0, math.nan, 1, 1, 1), (0, 0, 0, 1, 1, math.inf)],
)
def test_impossible_boxes_are_refused(edges):
    with pytest.raises(InputError, match="slice_min < slice_max"):
        Box(*edges)


def test_box_slices_cover_every_touched_voxel_and_stay_in_the_array():
    assert Box(-1.5, 0.2, 3, 1.1, 2, 4).slices == (slice(0, 2), slice(0, 2), slice(3, 4))


def test_box_clip_and_shift():
    assert Box(-1, 2, 3, 9, 9, 9).clip((4, 5, 6)) == Box(0, 2, 3, 4, 5, 6)
    assert Box(0, 0, 0, 1, 1, 1).shift(2, -3, 0.5) == Box(2, -3, 0.5, 3, -2, 1.5)
    with pytest.raises(InputError):
        Box(5, 0, 0, 6, 1, 1).clip((4, 4, 4))


def test_box_center_is_a_voxel_centre_index():
    assert Box(2, 2, 2, 3, 5, 4).center_index.tolist() == [2, 3, 2.5]


@settings(max_examples=30, deadline=None)
@given(affines(), st.tuples(*[st.integers(0, 30)] * 3), points)
def test_crop_keeps_points_in_place(affine, start, point):
    cropped = geometry.crop_affine(affine, start)
    expected = geometry.index_to_patient(affine, np.add(start, point))
    assert geometry.index_to_patient(cropped, point) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(affines())
def test_spacing_directions_and_volume(affine):
    spacing = np.array(geometry.spacing_of(affine))
    directions = geometry.directions_of(affine)
    assert directions * spacing == pytest.approx(affine[:3, :3], abs=1e-9)
    assert directions.T @ directions == pytest.approx(np.eye(3), abs=1e-9)
    assert geometry.voxel_volume_mm3(affine) == pytest.approx(spacing.prod())


def test_same_grid_looks_at_the_far_corner():
    first = geometry.make_affine((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1))
    second = geometry.make_affine((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1.001))
    assert geometry.same_grid(first, second, (5, 5, 5))
    assert not geometry.same_grid(first, second, (5, 5, 500))
