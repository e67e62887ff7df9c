"""Boxes of slices become lesions, and lesions findings in the patient."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvision.boxes import pairwise_iou
from medvision.findings.assemble import finding_mask, make_finding
from medvision.findings.config import PredictConfig
from medvision.findings.finding import SliceBox
from medvision.findings.merge import SliceDetections, link_slices
from medvision.geometry import Box, box_corners_mm, make_affine

CONFIG = PredictConfig(link_score_ratio=0.3)
OBLIQUE = make_affine(
    [10.0, -20.0, 30.0],
    [0.0, 0.6, 0.8],
    [0.0, 0.8, -0.6],
    [-1.0, 0.0, 0.0],
    [3.0, 0.5, 0.8],
)


def detections(*rows: tuple[int, float, float, float, float, float]) -> SliceDetections:
    """Rows of slice, x1, y1, x2, y2, score; two classes, the second with probability = score."""
    table = np.array(rows, dtype=float).reshape(-1, 6)
    scores = table[:, 5]
    return SliceDetections(
        table[:, 0].astype(np.int64), table[:, 1:5], scores, np.stack([1 - scores, scores], axis=1)
    )


def test_a_lesion_on_three_slices_is_one_and_a_distant_one_another() -> None:
    found = detections(
        (4, 10, 10, 20, 20, 0.8),
        (5, 11, 10, 21, 20, 0.9),
        (6, 11, 11, 20, 20, 0.4),
        (5, 60, 60, 66, 66, 0.5),
    )
    first, second = link_slices(found, CONFIG, 2)
    assert first.members.tolist() == [0, 1, 2]
    assert first.score == pytest.approx((0.9 + 0.8) / 2)
    assert second.members.tolist() == [3]
    # One box of two: the missing one counts as 0.
    assert second.score == pytest.approx(0.25)


def test_one_slice_may_be_bridged_but_not_two() -> None:
    bridged = link_slices(detections((1, 0, 0, 9, 9, 0.9), (3, 0, 0, 9, 9, 0.8)), CONFIG)
    assert [lesion.members.tolist() for lesion in bridged] == [[0, 1]]
    apart = link_slices(detections((1, 0, 0, 9, 9, 0.9), (4, 0, 0, 9, 9, 0.8)), CONFIG)
    assert len(apart) == 2


def test_weak_boxes_do_not_lengthen_a_lesion_and_are_not_reported_again() -> None:
    found = detections((1, 0, 0, 9, 9, 0.9), (2, 0, 0, 9, 9, 0.1), (1, 0, 1, 9, 9, 0.3))
    lesions = link_slices(found, CONFIG)
    assert [lesion.members.tolist() for lesion in lesions] == [[0]]


def test_two_lesions_side_by_side_on_the_same_slices_stay_two() -> None:
    rows = [(z, x, 0, x + 8, 8, 0.5 + z / 20 + x / 1000) for z in (3, 4, 5) for x in (0, 9)]
    lesions = link_slices(detections(*rows), CONFIG)
    assert sorted(len(lesion.members) for lesion in lesions) == [3, 3]


def test_nothing_links_to_nothing() -> None:
    assert link_slices(detections(), CONFIG) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_links_are_disjoint_sorted_and_do_not_depend_on_order(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    corner = generator.uniform(0, 40, (count, 2))
    boxes = np.concatenate([corner, corner + generator.uniform(2, 15, (count, 2))], axis=1)
    table = np.column_stack([generator.integers(0, 8, count), boxes, generator.permutation(count)])
    table[:, 5] = (table[:, 5] + 1) / (count + 1)
    lesions = link_slices(detections(*table.tolist()), CONFIG)
    rows = np.concatenate([lesion.members for lesion in lesions])
    assert len(rows) == len(set(rows.tolist()))
    assert [one.score for one in lesions] == sorted((one.score for one in lesions), reverse=True)
    for lesion in lesions:
        planes = table[lesion.members, 0]
        assert (np.diff(planes) >= 1).all()
        assert (np.diff(planes) <= 2).all()
    order = generator.permutation(count)
    shuffled = link_slices(detections(*table[order].tolist()), CONFIG)
    assert [set(order[one.members].tolist()) for one in shuffled] == [
        set(one.members.tolist()) for one in lesions
    ]


def test_iou_by_hand() -> None:
    first = np.array([[0.0, 0, 4, 4], [0, 0, 0, 0]])
    second = np.array([[2.0, 2, 6, 6]])
    np.testing.assert_allclose(pairwise_iou(first, second), [[4 / 28], [0]])


def test_a_finding_is_placed_in_the_patient_through_all_corners() -> None:
    found = detections((3, 10, 20, 16, 28, 0.9), (4, 11, 20, 17, 28, 0.7))
    (lesion,) = link_slices(found, CONFIG, 2)
    finding = make_finding(1, lesion, found, ("benign", "malignant"), (10, 60, 50), OBLIQUE)
    assert finding.box == Box(3, 20, 10, 5, 28, 17)
    corners = box_corners_mm(OBLIQUE, finding.box)
    assert finding.box_mm.y_min_mm == pytest.approx(corners[:, 1].min())
    assert finding.box_mm.z_max_mm == pytest.approx(corners[:, 2].max())
    assert finding.class_name == "malignant"
    assert finding.class_scores["malignant"] == pytest.approx(0.8 * (0.9 * 0.9 + 0.7 * 0.7) / 1.6)
    assert finding.key_slice == 3
    inverse = np.linalg.inv(OBLIQUE)
    center = inverse @ [*finding.center_mm, 1]
    np.testing.assert_allclose(center[1], 23.5)
    assert 3.4 < center[0] < 3.5
    assert 12.5 < center[2] < 13.0
    # Two ellipses of 6 x 8 pixels.
    assert finding.volume_mm3 == pytest.approx(2 * np.pi * 3 * 4 * 3.0 * 0.5 * 0.8, rel=0.1)
    assert finding.mask is not None
    assert finding.mask.shape == (2, 8, 7)


def test_a_box_over_the_edge_is_clipped_and_one_outside_keeps_a_pixel() -> None:
    found = detections((0, -4, -4, 3, 3, 0.9))
    (lesion,) = link_slices(found, CONFIG)
    assert make_finding(1, lesion, found, ("a", "b"), (1, 9, 9), np.eye(4)).box == Box(
        0, 0, 0, 1, 3, 3
    )
    found = detections((0, -6, 4, -2, 8, 0.9))
    (lesion,) = link_slices(found, CONFIG)
    box = make_finding(1, lesion, found, ("a", "b"), (1, 9, 9), np.eye(4)).box
    assert (box.column_min, box.column_max) == (0, 1)


def test_finding_mask_fills_bridged_slices() -> None:
    boxes = (SliceBox(2, 0, 0, 6, 6, 0.9), SliceBox(4, 1, 1, 4, 4, 0.8))
    mask = finding_mask(boxes, Box(2, 0, 0, 5, 6, 6))
    assert mask.shape == (3, 6, 6)
    assert mask.any(axis=(1, 2)).all()
