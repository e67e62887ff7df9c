"""Windows, resampling, stacks and crops against hand-worked numbers and SimpleITK."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medvision.geometry import Box, make_affine
from medvision.scans.volume import Volume
from medvision.stacks.config import StackConfig
from medvision.stacks.crops import body_box, crop_padded
from medvision.stacks.resample import resample_inplane, resize_slices, scaled_affine
from medvision.stacks.slice_stack import slice_stack, stack_offsets
from medvision.stacks.window import apply_window, window_limits

OBLIQUE = make_affine(
    [-12.0, 30.0, 5.0],
    [0.0, 0.5, np.sqrt(0.75)],
    [0.0, np.sqrt(0.75), -0.5],
    [1.0, 0.0, 0.0],
    [2.5, 0.9, 0.6],
)


def test_window_maps_and_clips() -> None:
    values = np.array([-2000, -1000, -300, 400, 3000], dtype=np.int16)
    np.testing.assert_allclose(apply_window(values, (-1000, 400)), [0, 0, 0.5, 1, 1])


def test_window_limits_by_percentile_ignore_outliers_and_flat_scans() -> None:
    array = np.zeros((4, 50, 50), dtype=np.float32)
    assert window_limits(array, None) == (0.0, 1.0)
    array[:] = np.linspace(0, 100, array.size).reshape(array.shape)
    low, high = window_limits(array, None)
    assert low == pytest.approx(0.5, abs=0.1)
    assert high == pytest.approx(99.5, abs=0.1)


def test_stack_config_refuses_even_counts_and_falling_windows() -> None:
    with pytest.raises(ValidationError, match="odd"):
        StackConfig(n_slices=4)
    with pytest.raises(ValidationError, match="low < high"):
        StackConfig(window_hu=(400, -1000))


@settings(max_examples=25, deadline=None)
@given(
    slices=st.integers(1, 9),
    n_slices=st.sampled_from([1, 3, 5, 9]),
    offset_mm=st.floats(0.5, 6),
    spacing_mm=st.floats(0.5, 6),
)
def test_stack_of_a_ramp_is_the_ramp_clipped_at_the_ends(
    slices: int, n_slices: int, offset_mm: float, spacing_mm: float
) -> None:
    # Every slice holds its own position in mm, so a channel must hold its position too.
    array = np.repeat(np.arange(slices, dtype=np.float32) * spacing_mm, 4).reshape(slices, 2, 2)
    offsets = stack_offsets(n_slices, offset_mm, spacing_mm)
    for index in range(slices):
        wanted = index * spacing_mm + (np.arange(n_slices) - n_slices // 2) * offset_mm
        wanted = np.clip(wanted, 0, (slices - 1) * spacing_mm)
        stack = slice_stack(array, index, offsets)
        np.testing.assert_allclose(stack[:, 1, 1], wanted, atol=2e-2 * spacing_mm)
        np.testing.assert_array_equal(stack[n_slices // 2], array[index])


def test_resampling_agrees_with_simpleitk_in_the_patient() -> None:
    generator = np.random.default_rng(0)
    array = generator.normal(size=(3, 40, 50)).astype(np.float32)
    array = np.stack([np.asarray(_blur(plane)) for plane in array])
    volume = Volume(array, OBLIQUE)
    small = resample_inplane(volume, 0.45)
    assert small.shape == (3, 80, 67)
    points = small.index_to_patient([[1, 10, 20], [2, 60, 40], [0, 33, 5]])
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.6, 0.9, 2.5))
    image.SetOrigin(OBLIQUE[:3, 3])
    directions = OBLIQUE[:3, [2, 1, 0]] / np.array([0.6, 0.9, 2.5])
    image.SetDirection(directions.ravel())
    wanted = [image.EvaluateAtPhysicalPoint(point, sitk.sitkLinear) for point in points.tolist()]
    got = [small.array[1, 10, 20], small.array[2, 60, 40], small.array[0, 33, 5]]
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def _blur(plane: np.ndarray) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.DiscreteGaussian(sitk.GetImageFromArray(plane), 4.0))


def test_resampling_keeps_the_outer_edges_and_leaves_equal_pixels_alone() -> None:
    volume = Volume(np.zeros((2, 30, 31), dtype=np.int16), OBLIQUE)
    small = resample_inplane(volume, 1.2)
    corners = volume.box_to_patient(Box(0, 0, 0, *volume.shape))
    moved = small.box_to_patient(Box(0, 0, 0, *small.shape))
    np.testing.assert_allclose(list(vars(corners).values()), list(vars(moved).values()), atol=1e-6)
    square = Volume(volume.array, make_affine([0, 0, 0], *np.eye(3), [1, 0.7, 0.7]))
    assert resample_inplane(square, 0.703) is square


def test_shrinking_is_smoothed_and_keeps_integers() -> None:
    checks = (np.indices((1, 64, 64)).sum(axis=0) % 2 * 1000).astype(np.int16)
    small = resize_slices(checks, (16, 16), smooth=True)
    assert small.dtype == np.int16
    # Without smoothing, sampling a checkerboard gives whatever it happens to hit.
    assert np.abs(small[0, 2:-2, 2:-2] - 500).max() < 60
    labels = resize_slices((checks > 0).astype(np.uint8) * 7, (128, 128), smooth=False)
    assert set(np.unique(labels)) == {0, 7}


def test_scaled_affine_of_the_same_shape_is_the_same() -> None:
    np.testing.assert_allclose(scaled_affine(OBLIQUE, (3, 4, 5), (3, 4, 5)), OBLIQUE)


def test_crop_padded_equals_padding_then_cutting() -> None:
    array = np.arange(2 * 6 * 5).reshape(2, 6, 5)
    padded = np.pad(array, ((0, 0), (9, 9), (9, 9)), constant_values=-1)
    for top, left in [(0, 0), (-3, 2), (4, 3), (-8, -8), (40, 0)]:
        got = crop_padded(array, top, left, (4, 7), -1)
        if top == 40:
            assert (got == -1).all()
        else:
            np.testing.assert_array_equal(got, padded[:, top + 9 : top + 13, left + 9 : left + 16])


def test_body_box_holds_the_body_and_falls_back_to_everything() -> None:
    array = np.full((5, 60, 80), -1000, dtype=np.int16)
    array[:, 20:40, 30:60] = 40
    box = body_box(array, "CT", margin=2)
    assert (box.row_min, box.row_max, box.column_min, box.column_max) == (18, 42, 28, 62)
    assert (box.slice_min, box.slice_max) == (0, 5)
    assert body_box(np.full((1, 8, 9), -1000, dtype=np.int16), "CT") == Box(0, 0, 0, 1, 8, 9)


def test_air_tells_a_ct_of_no_known_modality() -> None:
    array = np.full((4, 60, 60), -1000, dtype=np.int16)
    array[:, 20:40, 24:50] = -300  # soft against air, under a twentieth of nothing
    array[1, 30, 30] = 1200
    assert body_box(array, "", margin=0) == body_box(array, "CT", margin=0)
    assert body_box(array, "", margin=0) == Box(0, 20, 24, 4, 40, 50)
