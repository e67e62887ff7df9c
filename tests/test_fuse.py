"""Several looks at one scan become one set of boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvision.findings.config import MIRROR_IMAGES, PredictConfig
from medvision.findings.fuse import fuse_looks
from medvision.findings.merge import SliceDetections
from medvision.findings.outline import Outline
from medvision.models.flips import MIRRORED_AXES


def look(*rows: tuple[int, tuple[float, float, float, float], float], outlines: bool = False):
    """Detections from (slice, box, score); two classes, the first with the score's digits as probability."""
    scores = np.array([score for *_, score in rows], dtype=float)
    return SliceDetections(
        np.array([plane for plane, *_ in rows], dtype=np.int64),
        np.array([box for _, box, _ in rows], dtype=float).reshape(-1, 4),
        scores,
        np.stack([scores, 1 - scores], axis=1).reshape(-1, 2),
        tuple(Outline(np.full((1, 1), True), 0.0, score) for *_, score in rows) if outlines else (),
    )


def test_a_box_that_all_looks_see_keeps_their_mean_score_and_place() -> None:
    looks = [
        look((3, (10, 10, 20, 20), 0.9)),
        look((3, (11, 10, 21, 20), 0.6)),
        look((3, (10, 12, 20, 22), 0.3)),
    ]
    found = fuse_looks(looks, 0.3)
    assert found.slice_index.tolist() == [3]
    assert found.scores[0] == pytest.approx((0.9 + 0.6 + 0.3) / 3)
    # By hand: 0.9, 0.6 and 0.3 of 1.8 are 1/2, 1/3 and 1/6.
    expected = [10 + 1 / 3, 10 + 2 / 6, 20 + 1 / 3, 20 + 2 / 6]
    np.testing.assert_allclose(found.boxes[0], expected)
    # The first look is in the pixel size of training: it names the class.
    assert found.class_probabilities[0].tolist() == pytest.approx([0.9, 0.1])


def test_a_box_that_one_look_sees_counts_a_third() -> None:
    looks = [look((0, (0, 0, 8, 8), 0.6)), look(), look((1, (0, 0, 8, 8), 0.9))]
    found = fuse_looks(looks, 0.3)
    # Another slice is another place.
    assert dict(zip(found.slice_index.tolist(), found.scores.tolist(), strict=True)) == (
        pytest.approx({0: 0.2, 1: 0.3})
    )
    assert fuse_looks(looks, 0.3, lowest=0.25).slice_index.tolist() == [1]


def test_two_boxes_of_one_look_count_once() -> None:
    looks = [look((0, (0, 0, 8, 8), 0.8), (0, (0, 0, 8, 9), 0.7)), look((0, (0, 0, 8, 8), 0.4))]
    assert fuse_looks(looks, 0.3).scores.tolist() == pytest.approx([0.6])


def test_neighbours_that_hardly_overlap_stay_apart() -> None:
    looks = [look((0, (0, 0, 10, 10), 0.8)), look((0, (8, 0, 18, 10), 0.6))]
    assert sorted(fuse_looks(looks, 0.3).scores.tolist()) == pytest.approx([0.3, 0.4])


def test_the_outline_is_that_of_the_best_box() -> None:
    looks = [
        look((0, (0, 0, 8, 8), 0.3), outlines=True),
        look((0, (0, 0, 8, 8), 0.9), outlines=True),
    ]
    assert [outline.column for outline in fuse_looks(looks, 0.3).outlines] == [0.9]


def test_a_look_has_no_vote_on_boxes_larger_than_its_largest() -> None:
    # The second look votes up to 10 wide and 8 high: on the first box, not on the wide or the high one.
    rows = [(0, (0, 0, 10, 8)), (1, (0, 0, 11, 8)), (2, (0, 0, 10, 9))]
    looks = [look(*[(*row, 0.8) for row in rows]), look(*[(*row, 0.2) for row in rows])]
    found = fuse_looks(looks, 0.3, largest=[(np.inf, np.inf), (10, 8)])
    assert dict(zip(found.slice_index.tolist(), found.scores.tolist(), strict=True)) == (
        pytest.approx({0: 0.5, 1: 0.8, 2: 0.8})
    )


def test_what_only_a_look_without_a_vote_sees_is_left_out() -> None:
    looks = [look(), look((0, (0, 0, 20, 20), 0.9), (1, (0, 0, 5, 5), 0.9))]
    found = fuse_looks(looks, 0.3, largest=[(np.inf, np.inf), (10, 10)])
    assert found.slice_index.tolist() == [1]
    assert found.scores.tolist() == pytest.approx([0.45])


def test_a_pixel_at_the_limit_costs_no_score() -> None:
    # By itself the second look's box is just too large for a vote; it belongs to one that is not.
    looks = [look((0, (0, 0, 10, 10), 0.9)), look((0, (0, 0, 11, 10), 0.9))]
    found = fuse_looks(looks, 0.3, largest=[(np.inf, np.inf), (10, 10)])
    assert found.scores.tolist() == pytest.approx([0.9])
    # Were it the better one, it would still start no group of its own.
    looks[1] = look((0, (0, 0, 11, 10), 0.95))
    found = fuse_looks(looks, 0.3, largest=[(np.inf, np.inf), (10, 10)])
    assert found.scores.tolist() == pytest.approx([(0.9 + 0.95) / 2])


def test_part_of_a_lesion_seen_by_a_look_without_a_vote_takes_no_part() -> None:
    # Half of a large lesion, by itself small enough for a vote, is used up by the whole.
    looks = [look((0, (0, 0, 20, 20), 0.8)), look((0, (0, 0, 20, 10), 0.6))]
    found = fuse_looks(looks, 0.3, largest=[(np.inf, np.inf), (20, 12)])
    assert found.scores.tolist() == pytest.approx([0.8])
    np.testing.assert_allclose(found.boxes, [[0, 0, 20, 20]])


def test_nothing_found_anywhere_stays_nothing() -> None:
    found = fuse_looks([look(), look()], 0.3)
    assert found.boxes.shape == (0, 4)
    assert found.class_probabilities.shape == (0, 2)
    assert len(found.scores) == len(found.slice_index) == 0


boxes = st.tuples(
    st.integers(0, 2),
    st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(13, 30)] * 2),
    st.floats(0.01, 1),
)


@given(st.lists(boxes, max_size=8))
def test_a_look_fused_with_itself_scores_as_its_best_boxes(rows) -> None:
    one = look(*rows)
    twice = fuse_looks([one, one], 0.3)
    assert set(np.round(twice.scores, 9)) <= set(np.round(one.scores, 9))
    if rows:
        assert twice.scores.max() == pytest.approx(one.scores.max())


@given(st.lists(boxes, max_size=6), st.lists(boxes, max_size=6))
def test_the_order_of_the_looks_does_not_matter(first, second) -> None:
    # Boxes of equal score are taken in order of place, so they must differ for this law.
    scores = [score for *_, score in first + second]
    if len(set(scores)) < len(scores):
        return
    there = fuse_looks([look(*first), look(*second)], 0.3)
    back = fuse_looks([look(*second), look(*first)], 0.3)
    order = [np.lexsort((item.scores, item.slice_index)) for item in (there, back)]
    np.testing.assert_allclose(there.scores[order[0]], back.scores[order[1]])


@given(st.lists(boxes, max_size=6), st.lists(boxes, max_size=6))
def test_a_limit_that_nothing_reaches_changes_nothing(first, second) -> None:
    looks = [look(*first), look(*second)]
    free, limited = fuse_looks(looks, 0.3), fuse_looks(looks, 0.3, largest=[(30, 30), (30, 30)])
    np.testing.assert_array_equal(free.boxes, limited.boxes)
    np.testing.assert_array_equal(free.scores, limited.scores)


@given(st.lists(boxes, max_size=6), st.lists(boxes, max_size=6))
def test_without_a_vote_on_anything_the_other_look_stands_alone(first, second) -> None:
    looks = [look(*first), look(*second)]
    fused = fuse_looks(looks, 0.3, largest=[(np.inf, np.inf), (0, 0)])
    np.testing.assert_array_equal(fused.scores, fuse_looks([looks[0], look()], 0.3).scores * 2)


def test_looks_are_counted_by_their_pixels() -> None:
    assert len(MIRRORED_AXES) == MIRROR_IMAGES
    settings = PredictConfig(flips=True, scales=(1.0, 0.5, 2.0))
    assert settings.looks == pytest.approx(4 + 4 + 0.25)
    assert settings.plain().looks == 1
