"""The two hit rules: LUNA16's centre within the lesion, COCO's overlap of boxes."""

from __future__ import annotations

import numpy as np
import pytest

from medvision import geometry
from medvision.evaluation.case import (
    CaseResult,
    center_mm,
    contains,
    equivalent_diameter_mm,
    longest_diameter_mm,
)
from medvision.evaluation.matching import (
    Outcome,
    box_iou,
    hits_by_distance,
    keep_top,
    match_boxes,
    match_centers,
    match_hits,
    match_overlaps,
)
from medvision.findings.finding import Finding
from medvision.geometry import Box
from medvision.labels.annotation import Annotation

OBLIQUE = geometry.make_affine(
    (-80.0, 40.0, 500.0),
    (0.0, -0.6, 0.8),
    (0.0, 0.8, 0.6),
    (-1.0, 0.0, 0.0),
    (2.5, 0.7, 0.9),
)


def ball(center: tuple[int, int, int], radius_mm: float, affine: np.ndarray) -> Annotation:
    reach = np.ceil(radius_mm / np.array(geometry.spacing_of(affine))).astype(int) + 1
    low = np.array(center) - reach
    grid = np.moveaxis(np.indices(2 * reach + 1), 0, -1) + low
    gap = geometry.index_to_patient(affine, grid) - geometry.index_to_patient(affine, center)
    mask = np.linalg.norm(gap, axis=-1) < radius_mm
    return Annotation(1, "solid", Box(*low.tolist(), *(low + 2 * reach + 1).tolist()), mask)


def found_at(
    index: tuple[float, float, float],
    affine: np.ndarray = OBLIQUE,
    *,
    number: int = 1,
    score: float = 0.5,
    class_name: str = "solid",
    class_scores: dict[str, float] | None = None,
    box: Box | None = None,
) -> Finding:
    box = box or Box(*(np.array(index) - 0.5).tolist(), *(np.array(index) + 1.5).tolist())
    x, y, z = geometry.index_to_patient(affine, index).tolist()
    return Finding(
        number,
        class_name,
        score,
        box,
        geometry.box_to_patient(affine, box),
        (x, y, z),
        int(index[0]),
        5.0,
        60.0,
        class_scores or {},
    )


def scan(findings: list[Finding], annotations: list[Annotation]) -> CaseResult:
    return CaseResult("scan", tuple(findings), tuple(annotations), OBLIQUE, (40, 200, 200))


def test_measures_of_a_ball_on_an_oblique_grid_are_those_of_the_ball() -> None:
    lesion = ball((20, 90, 70), 8.0, OBLIQUE)
    assert equivalent_diameter_mm(lesion, OBLIQUE) == pytest.approx(16.0, rel=0.02)
    assert longest_diameter_mm(lesion, OBLIQUE) == pytest.approx(16.0, rel=0.06)
    expected = geometry.index_to_patient(OBLIQUE, (20, 90, 70))
    np.testing.assert_allclose(center_mm(lesion, OBLIQUE), expected, atol=1e-6)


def test_box_without_mask_is_the_ellipsoid_in_it() -> None:
    lesion = Annotation(1, "solid", Box(10, 20, 30, 12, 30, 40))
    # 2 x 2.5 mm, 10 x 0.7 mm, 10 x 0.9 mm
    assert equivalent_diameter_mm(lesion, OBLIQUE) == pytest.approx((5 * 7 * 9) ** (1 / 3))
    assert longest_diameter_mm(lesion, OBLIQUE) == pytest.approx(9.0)
    middle, corner, end = (10.5, 24.5, 34.5), (9.6, 19.6, 29.6), (10.5, 24.5, 39.4)
    points = geometry.index_to_patient(OBLIQUE, [middle, corner, end])
    assert contains(lesion, OBLIQUE, points).tolist() == [True, False, True]


def test_contains_rounds_to_the_voxel_whose_edges_hold_the_point() -> None:
    mask = np.zeros((1, 2, 2), dtype=bool)
    mask[0, 0, 1] = True
    lesion = Annotation(1, "solid", Box(5, 6, 7, 6, 8, 9), mask)
    indices = [(5, 6, 8), (5.49, 6.49, 8.49), (5.51, 6, 8), (5, 6, 7), (0, 0, 0)]
    points = geometry.index_to_patient(OBLIQUE, indices)
    assert contains(lesion, OBLIQUE, points).tolist() == [True, True, False, False, False]


def test_distance_must_be_below_half_the_diameter() -> None:
    hits = hits_by_distance([[0, 0, 4.9], [0, 0, 5.0], [3, 4, 0]], [[0, 0, 0]], [10.0])
    assert hits.ravel().tolist() == [True, False, False]
    assert hits_by_distance(np.zeros((0, 3)), np.zeros((0, 3)), []).shape == (0, 0)
    assert hits_by_distance([[0, 0, 0]], [], []).shape == (1, 0)


def test_hit_just_inside_and_just_outside_the_equivalent_sphere() -> None:
    lesion = ball((20, 90, 70), 8.0, OBLIQUE)
    radius = equivalent_diameter_mm(lesion, OBLIQUE) / 2
    for distance, outcome in ((radius - 0.05, Outcome.HIT), (radius + 1.0, Outcome.FALSE_POSITIVE)):
        near = found_at((20, 90, 70 + distance / 0.9))
        assert match_centers(scan([near], [lesion])).outcome.tolist() == [outcome]


def test_end_of_a_long_thin_lesion_is_a_hit_and_tissue_beside_it_is_not() -> None:
    mask = np.ones((1, 2, 40), dtype=bool)
    lesion = Annotation(1, "solid", Box(20, 90, 50, 21, 92, 90), mask)
    end, beside = found_at((20, 90, 88)), found_at((20, 90 + 10 / 0.7, 70), number=2)
    # The longest diameter is 36 mm: a sphere over it would take the second one, 10 mm off, too.
    match = match_centers(scan([end, beside], [lesion]))
    assert match.outcome.tolist() == [Outcome.HIT, Outcome.FALSE_POSITIVE]


def test_lesion_of_one_voxel_is_hit_in_that_voxel() -> None:
    lesion = Annotation(1, "solid", Box(20, 90, 70, 21, 91, 71), np.ones((1, 1, 1), dtype=bool))
    for index, outcome in (((20.4, 90.4, 70.4), Outcome.HIT), ((21, 92, 70), 0)):
        assert match_centers(scan([found_at(index)], [lesion])).outcome.tolist() == [outcome]


def test_best_hit_finds_the_lesion_and_further_hits_do_not_count() -> None:
    lesion = ball((20, 90, 70), 8.0, OBLIQUE)
    findings = [
        found_at((20, 91, 70), number=2, score=0.7),
        found_at((20, 90, 70), number=1, score=0.9),
        found_at((5, 10, 10), number=3, score=0.6),
    ]
    match = match_centers(scan(findings, [lesion]))
    assert match.outcome.tolist() == [Outcome.HIT, Outcome.EXTRA, Outcome.FALSE_POSITIVE]
    assert match.found_by.tolist() == [0]
    assert match.lesion_scores.tolist() == [0.9]
    assert match.false_scores.tolist() == [0.6]


def test_ignored_region_drops_a_finding_unless_it_hits_a_lesion() -> None:
    lesion = ball((20, 90, 70), 8.0, OBLIQUE)
    around = ball((20, 90, 70), 20.0, OBLIQUE)
    ignored = Annotation(2, "solid", around.box, around.mask, ignore=True)
    findings = [
        found_at((20, 90, 70), number=1, score=0.9),
        found_at((20, 90, 84), number=2, score=0.8),
    ]
    match = match_centers(scan(findings, [lesion, ignored]))
    assert match.outcome.tolist() == [Outcome.HIT, Outcome.IGNORED]
    assert len(match.found_by) == 1


def test_one_finding_may_find_two_overlapping_lesions() -> None:
    match = match_hits([0.5], np.array([[True, True]]), np.array([False]))
    assert match.found_by.tolist() == [0, 0]
    assert match.outcome.tolist() == [Outcome.HIT]


def test_no_findings_and_no_lesions() -> None:
    lesion = ball((20, 90, 70), 8.0, OBLIQUE)
    assert match_centers(scan([], [lesion])).lesion_scores.tolist() == [-np.inf]
    assert match_centers(scan([found_at((1, 1, 1))], [])).outcome.tolist() == [0]
    assert match_centers(scan([], [])).outcome.shape == (0,)
    assert match_boxes(scan([], [lesion]), 0.1).found_by.tolist() == [-1]
    assert match_boxes(scan([found_at((1, 1, 1))], []), 0.1).outcome.tolist() == [0]


def test_class_wise_matching_ranks_by_the_class_score() -> None:
    solid = ball((20, 90, 70), 8.0, OBLIQUE)
    findings = [
        found_at((20, 90, 70), score=0.9, class_scores={"solid": 0.6, "glass": 0.3}),
        found_at((20, 91, 70), number=2, score=0.8, class_name="glass"),
    ]
    match = match_centers(scan(findings, [solid]), "solid")
    assert match.scores.tolist() == [0.6]
    assert match.outcome.tolist() == [Outcome.HIT]
    # Named otherwise on a lesion of another class: a false positive of that class.
    other = match_centers(scan(findings, [solid]), "glass")
    assert other.outcome.tolist() == [Outcome.FALSE_POSITIVE]
    assert other.found_by.shape == (0,)


def test_box_iou_by_hand() -> None:
    first = np.array([[0, 0, 0, 2, 2, 2]], dtype=float)
    second = np.array([[1, 1, 1, 3, 3, 3], [2, 0, 0, 4, 2, 2], [0, 0, 0, 2, 2, 2]], dtype=float)
    np.testing.assert_allclose(box_iou(first, second), [[1 / 15, 0.0, 1.0]])


def test_overlap_counts_a_second_finding_as_false() -> None:
    overlaps = np.array([[0.6], [0.9]])
    match = match_overlaps([0.8, 0.7], overlaps, np.zeros(2, dtype=bool), 0.5)
    assert match.outcome.tolist() == [Outcome.HIT, Outcome.FALSE_POSITIVE]


def test_overlap_takes_the_largest_free_lesion_at_the_threshold_or_above() -> None:
    overlaps = np.array([[0.5, 0.7], [0.2, 0.9]])
    match = match_overlaps([0.8, 0.7], overlaps, np.zeros(2, dtype=bool), 0.2)
    assert match.found_by.tolist() == [1, 0]


def test_overlap_drops_findings_on_an_ignored_region_but_not_those_on_a_lesion() -> None:
    box = Box(10, 10, 10, 12, 20, 20)
    ignored = Annotation(2, "solid", Box(10, 10, 10, 12, 40, 40), ignore=True)
    findings = [
        found_at((11, 15, 15), number=1, score=0.9, box=box),
        found_at((11, 25, 25), number=2, score=0.8, box=Box(10, 22, 22, 12, 30, 30)),
        found_at((11, 90, 90), number=3, score=0.7, box=Box(10, 90, 90, 12, 95, 95)),
    ]
    match = match_boxes(scan(findings, [Annotation(1, "solid", box), ignored]), 0.5)
    expected = [Outcome.HIT, Outcome.IGNORED, Outcome.FALSE_POSITIVE]
    assert match.outcome.tolist() == expected


def test_keep_top_takes_ties_together() -> None:
    assert keep_top([0.9, 0.5, 0.5, 0.7], 4).all()
    assert keep_top([0.9, 0.5, 0.5, 0.7], 3).tolist() == [True, False, False, True]
    assert keep_top([], 3).shape == (0,)
