"""Probability volumes -> findings: by hand, against scipy, and where they are in the patient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from medvision.errors import InputError
from medvision.findings.components import (
    ProbabilityVolume,
    find_components,
    find_components_as_findings,
)
from medvision.findings.config import ComponentsConfig
from medvision.findings.finding import Finding
from medvision.geometry import Affine, index_to_patient, make_affine, voxel_volume_mm3

PLAIN = make_affine([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [2.0, 0.5, 0.5])
OBLIQUE = make_affine(
    [10.0, -20.0, 30.0], [0.0, 0.6, 0.8], [0.0, 0.8, -0.6], [-1.0, 0.0, 0.0], [3.0, 0.5, 0.8]
)
NAMES = ("dark", "bright")
WHOLE = ComponentsConfig(threshold=0.3, peak_share=0.0, connectivity=26)


def classes_of(lesion: NDArray[np.float32], share: float = 0.25) -> NDArray[np.float32]:
    return np.stack([lesion * share, lesion * (1 - share)]).astype(np.float32)


def findings(
    lesion: NDArray[np.float32],
    config: ComponentsConfig = WHOLE,
    affine: Affine = PLAIN,
    **limits: Any,
) -> tuple[Finding, ...]:
    volume = ProbabilityVolume.of_scan(lesion, classes_of(lesion))
    shape = (lesion.shape[0], lesion.shape[1], lesion.shape[2])
    return find_components_as_findings(volume, config, NAMES, shape, affine, **limits)


def empty(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape or (8, 20, 30), dtype=np.float32)


def test_nothing_above_the_threshold_is_no_finding() -> None:
    assert findings(empty()) == ()
    assert findings(empty() + 0.299) == ()
    assert findings(np.full((2, 3, 4), np.nan, dtype=np.float32)) == ()


@pytest.mark.parametrize("affine", [PLAIN, OBLIQUE], ids=["plain", "oblique"])
def test_a_cuboid_becomes_the_finding_that_it_is(affine: Affine) -> None:
    lesion = empty()
    lesion[2:5, 6:10, 20:28] = 0.8
    lesion[3, 6:10, 20:28] = 0.9
    (found,) = findings(lesion, affine=affine)
    assert found.finding_id == 1
    assert found.score == pytest.approx((0.8 * 2 + 0.9) / 3)
    assert found.box.lower.tolist() == [2, 6, 20]
    assert found.box.upper.tolist() == [5, 10, 28]
    assert found.mask is not None
    assert found.mask.shape == (3, 4, 8)
    assert found.mask.all()
    assert found.volume_mm3 == pytest.approx(96 * voxel_volume_mm3(affine))
    expected = index_to_patient(affine, [3.0, 7.5, 23.5])
    np.testing.assert_allclose(found.center_mm, expected, atol=1e-4)
    low = [found.box_mm.x_min_mm, found.box_mm.y_min_mm, found.box_mm.z_min_mm]
    high = [found.box_mm.x_max_mm, found.box_mm.y_max_mm, found.box_mm.z_max_mm]
    assert (np.array(low) < found.center_mm).all()
    assert (np.array(high) > found.center_mm).all()
    assert found.key_slice == 3
    assert [box.slice_index for box in found.slice_boxes] == [2, 3, 4]
    assert found.slice_boxes[1].score == pytest.approx(0.9)
    assert (found.slice_boxes[0].row_min, found.slice_boxes[0].column_max) == (6, 28)


def test_the_diameter_is_measured_in_the_plane() -> None:
    lesion = empty()
    lesion[:, 5, 3:15] = 0.9
    (found,) = findings(lesion)
    assert found.diameter_mm == pytest.approx(12 * 0.5)


def test_the_class_is_that_of_the_mean_class_probability() -> None:
    lesion = empty()
    lesion[1, 1:3, 1:3] = 0.8
    classes = classes_of(lesion, 0.5)
    classes[:, 1, 1, 1] = (0.8, 0.0)  # one sure voxel against three that lean the other way
    classes[:, 1, 2, :] = np.array([0.3, 0.5])[:, None]
    classes[:, 1, 1, 2] = (0.3, 0.5)
    volume = ProbabilityVolume.of_scan(lesion, classes)
    (found,) = find_components_as_findings(volume, WHOLE, NAMES, lesion.shape, PLAIN)
    shares = np.array([0.8 + 3 * 0.3, 3 * 0.5]) / 3.2
    assert found.class_name == "dark"
    assert found.class_scores["dark"] == pytest.approx(0.8 * shares[0])
    assert sum(found.class_scores.values()) == pytest.approx(found.score)


def test_findings_come_by_falling_score_and_limits_cut_the_tail() -> None:
    lesion = empty()
    for column, value in ((2, 0.4), (8, 0.9), (14, 0.6)):
        lesion[3, 4:7, column : column + 3] = value
    found = findings(lesion)
    assert [item.score for item in found] == pytest.approx([0.9, 0.6, 0.4])
    assert [item.finding_id for item in found] == [1, 2, 3]
    assert len(findings(lesion, lowest_score=0.5)) == 2
    assert len(findings(lesion, most=1)) == 1
    assert findings(lesion, most=1)[0].score == pytest.approx(0.9)


def test_two_lesions_apart_stay_apart() -> None:
    lesion = empty()
    lesion[3, 4:8, 4:8] = lesion[3, 4:8, 9:13] = 0.9
    assert len(findings(lesion)) == 2
    above = empty()
    above[1, 4:8, 4:8] = above[3, 4:8, 4:8] = 0.9
    assert len(findings(above)) == 2


def test_a_faint_bridge_does_not_join_two_lesions() -> None:
    lesion = empty()
    lesion[3, 4:8, 4:8] = lesion[3, 4:8, 10:14] = 0.9
    lesion[3, 5:7, 8:10] = 0.35
    assert len(findings(lesion)) == 1
    apart = findings(lesion, WHOLE.model_copy(update={"peak_share": 0.5}))
    assert [item.mask.sum() for item in apart] == [16, 16]
    assert [item.score for item in apart] == pytest.approx([0.9, 0.9])


def test_peak_share_takes_the_blurred_rim_off_and_keeps_faint_lesions() -> None:
    grid = np.mgrid[0:9, 0:21, 0:31]
    lesion = empty(9, 21, 31)
    for middle, height in (((4, 10, 8), 1.0), ((4, 10, 23), 0.5)):
        squared = sum((axis - place) ** 2 for axis, place in zip(grid, middle, strict=True))
        lesion = np.maximum(lesion, height * np.exp(-squared / (2 * 2.0**2)).astype(np.float32))
    found = findings(lesion, ComponentsConfig(threshold=0.1, peak_share=0.5))
    # Full width at half maximum of a Gaussian is 2.355 deviations whatever its height.
    for item in found:
        radius = (0.75 * item.mask.sum() / np.pi) ** (1 / 3)
        assert 2 * radius == pytest.approx(2.355 * 2.0, rel=0.1)
    assert found[0].score == pytest.approx(2 * found[1].score, rel=1e-3)


def test_hysteresis_drops_what_nowhere_reaches_the_seed() -> None:
    lesion = empty()
    lesion[3, 4:8, 4:8] = 0.4
    lesion[3, 4:8, 12:16] = 0.4
    lesion[3, 5, 13] = 0.8
    (found,) = findings(lesion, WHOLE.model_copy(update={"seed_threshold": 0.7}))
    assert found.mask.sum() == 16
    assert found.box.lower[2] == 12


@pytest.mark.parametrize(("connectivity", "count"), [(6, 3), (18, 2), (26, 1)])
def test_connectivity_counts_faces_edges_and_corners(connectivity: int, count: int) -> None:
    lesion = empty()
    lesion[1, 1, 1] = lesion[1, 2, 2] = lesion[2, 3, 3] = 0.9
    config = WHOLE.model_copy(update={"connectivity": connectivity})
    assert len(findings(lesion, config)) == count


def test_specks_can_be_left_out() -> None:
    lesion = empty()
    lesion[1, 1, 1] = 0.9
    lesion[4, 4, 4:7] = 0.6
    (found,) = findings(lesion, WHOLE.model_copy(update={"least_voxels": 3}))
    assert found.score == pytest.approx(0.6)


@given(st.integers(0, 200), st.floats(0.3, 0.9))
def test_components_are_scipys_and_cover_what_is_above(seed: int, threshold: float) -> None:
    generator = np.random.default_rng(seed)
    lesion = ndimage.gaussian_filter(generator.random((5, 9, 11)), 0.7).astype(np.float32)
    lesion = (lesion - lesion.min()) / (lesion.max() - lesion.min())
    config = ComponentsConfig(threshold=threshold, peak_share=0.0, connectivity=6)
    found = find_components(lesion, config, most=1000)
    labels, count = ndimage.label(lesion >= threshold)
    assert len(found) == count
    drawn = np.zeros(lesion.shape, dtype=int)
    for item in found:
        drawn[item.window] += item.mask
        assert item.score == pytest.approx(float(lesion[item.window][item.mask].mean()), abs=1e-5)
    np.testing.assert_array_equal(drawn, labels > 0)
    scores = [item.score for item in found]
    assert scores == sorted(scores, reverse=True)
    assert all(item.score >= threshold - 1e-6 for item in found)


@given(st.integers(0, 50), st.floats(0.0, 1.0))
def test_a_higher_peak_share_only_takes_voxels_away(seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    lesion = ndimage.gaussian_filter(generator.random((4, 8, 9)), 0.8)
    lesion = ((lesion - lesion.min()) / (lesion.max() - lesion.min())).astype(np.float32)

    def drawn(value: float) -> NDArray[np.bool_]:
        config = ComponentsConfig(threshold=0.4, peak_share=value)
        whole = np.zeros(lesion.shape, dtype=bool)
        for item in find_components(lesion, config, most=1000):
            whole[item.window] |= item.mask
        return whole

    assert not (drawn(share) & ~drawn(0.0)).any()
    assert drawn(share)[np.unravel_index(lesion.argmax(), lesion.shape)]


def seen_volume(
    shape: tuple[int, int, int],
    seen: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
) -> NDArray[np.float32]:
    """Return a window of a seen grid that is 0.9 where the scan's 10..30, 20..50 mm-like field is."""
    rows = (np.arange(seen[0]) + 0.5) * shape[1] / seen[0]
    columns = (np.arange(seen[1]) + 0.5) * shape[2] / seen[1]
    inside = ((rows > 10) & (rows < 30))[:, None] & ((columns > 20) & (columns < 50))[None]
    plane = np.where(inside, 0.9, 0.0).astype(np.float32)
    cut = plane[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
    volume = np.zeros((shape[0], *cut.shape), dtype=np.float32)
    volume[1:3] = cut
    return volume


@pytest.mark.parametrize("seen", [(60, 80), (120, 160), (40, 50), (77, 131)], ids=str)
def test_a_window_of_another_grid_lands_where_it_is_in_the_scan(seen: tuple[int, int]) -> None:
    shape, corner = (4, 60, 80), (3, 5)
    lesion = seen_volume(shape, seen, corner, (seen[0] - 4, seen[1] - 7))
    volume = ProbabilityVolume(lesion, classes_of(lesion), corner, seen)
    (found,) = find_components_as_findings(volume, WHOLE, NAMES, shape, OBLIQUE)
    reach = max(1.0, 60 / seen[0], 80 / seen[1])
    np.testing.assert_allclose(found.box.lower, [1, 10, 20], atol=reach)
    np.testing.assert_allclose(found.box.upper, [3, 30, 50], atol=reach)
    assert found.mask.shape == tuple((found.box.upper - found.box.lower).astype(int))
    assert found.mask.all()
    expected = index_to_patient(OBLIQUE, [1.5, 19.5, 34.5])
    np.testing.assert_allclose(found.center_mm, expected, atol=0.8 * reach)
    assert found.score == pytest.approx(0.9)


@pytest.mark.parametrize("row", range(8))
def test_a_lesion_between_the_voxels_of_a_coarser_scan_is_not_lost(row: int) -> None:
    lesion = empty(3, 8, 8)
    lesion[1, row, 7] = 0.9
    volume = ProbabilityVolume(lesion, classes_of(lesion), (0, 0), (8, 8))
    (found,) = find_components_as_findings(volume, WHOLE, NAMES, (3, 2, 2), PLAIN)
    assert found.mask.sum() == 1
    assert found.box.lower.tolist() == [1, row // 4, 1]
    assert found.key_slice == 1


def test_arrays_that_do_not_go_together_are_refused() -> None:
    lesion = empty(3, 8, 8)
    one = ProbabilityVolume.of_scan(lesion, lesion[None])
    with pytest.raises(InputError, match="Class probabilities"):
        find_components_as_findings(one, WHOLE, NAMES, (3, 8, 8), PLAIN)
    good = classes_of(lesion)
    with pytest.raises(InputError, match="must lie in 4 slices"):
        find_components_as_findings(
            ProbabilityVolume.of_scan(lesion, good), WHOLE, NAMES, (4, 8, 8), PLAIN
        )
    with pytest.raises(InputError, match=r"\(9, 9\)"):
        find_components_as_findings(
            ProbabilityVolume(lesion, good, (2, 0), (9, 9)), WHOLE, NAMES, (3, 9, 9), PLAIN
        )


def test_half_precision_probabilities_are_enough() -> None:
    lesion = empty()
    lesion[2:5, 6:10, 20:28] = 0.75
    volume = ProbabilityVolume.of_scan(
        lesion.astype(np.float16), classes_of(lesion).astype(np.float16)
    )
    (found,) = find_components_as_findings(volume, WHOLE, NAMES, lesion.shape, PLAIN)
    assert found.score == pytest.approx(0.75)
    assert found.class_name == "bright"
