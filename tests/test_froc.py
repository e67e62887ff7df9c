"""The FROC curve: by hand, by law, and against the published figures of LUNA16."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvision.evaluation.bootstrap import draw_weights
from medvision.evaluation.froc import (
    FROC_RATES,
    DetectionTable,
    competition_metric,
    froc_curve,
    make_table,
    operating_threshold,
    sensitivity_at,
    sensitivity_draws,
)
from medvision.evaluation.matching import (
    Outcome,
    ScanMatch,
    hits_by_distance,
    keep_top,
    match_hits,
)

LUNA16 = Path("/work/shared/data/luna16")


def table(
    lesions: list[tuple[int, float]], false: list[tuple[int, float]], n_cases: int = 4
) -> DetectionTable:
    lesion, wrong = (np.array(rows, dtype=float).reshape(-1, 2) for rows in (lesions, false))
    return DetectionTable(
        n_cases, lesion[:, 0].astype(int), lesion[:, 1], wrong[:, 0].astype(int), wrong[:, 1]
    )


BY_HAND = table(
    [(0, 0.9), (1, 0.6), (1, 0.3), (2, -np.inf)], [(3, 0.8), (0, 0.5), (3, 0.4), (2, 0.4)]
)


def test_curve_by_hand() -> None:
    curve = froc_curve(BY_HAND)
    assert curve.threshold.tolist() == [np.inf, 0.9, 0.8, 0.6, 0.5, 0.4, 0.3]
    assert (curve.fp_per_scan * 4).tolist() == [0, 0, 1, 1, 2, 4, 4]
    assert (curve.sensitivity * 4).tolist() == [0, 1, 1, 2, 2, 2, 3]
    rates = (0.125, 0.25, 0.5, 1.0, 8.0)
    assert (sensitivity_at(curve, rates) * 4).tolist() == [1, 2, 2, 3, 3]
    assert competition_metric(curve) * 4 == pytest.approx((1 + 2 + 2 + 3 * 4) / 7)


def test_shared_scores_are_taken_together_and_part_the_two_readings() -> None:
    tied = froc_curve(table([(0, 0.5), (1, 0.5)], [(2, 0.5), (3, 0.5)]))
    assert tied.threshold.tolist() == [np.inf, 0.5]
    # The curve runs from (0, 0) to (0.5, 1): half of it is on the line, none of it is reached.
    assert sensitivity_at(tied, 0.25, "linear").tolist() == [0.5]
    assert sensitivity_at(tied, 0.25, "step").tolist() == [0.0]
    assert sensitivity_at(tied, 0.5, "step").tolist() == [1.0]


def test_operating_threshold_is_the_lowest_allowed() -> None:
    assert operating_threshold(BY_HAND, 0.25) == 0.6
    assert operating_threshold(BY_HAND, 0.75) == 0.5
    assert operating_threshold(BY_HAND, 1.0) == 0.3
    assert operating_threshold(BY_HAND, 0.0) == 0.9
    assert operating_threshold(table([(0, 0.3)], [(1, 0.7)]), 0.0) == np.inf
    assert operating_threshold(table([], []), 1.0) == np.inf


def test_undefined_without_lesions_zero_without_findings() -> None:
    assert np.isnan(competition_metric(froc_curve(table([], [(0, 0.5)]))))
    assert competition_metric(froc_curve(table([(0, -np.inf)], []))) == 0.0


def test_draws_equal_a_table_with_the_scans_copied() -> None:
    weights = draw_weights([str(number) for number in range(4)], 20, seed=3)
    got = sensitivity_draws(BY_HAND, weights, FROC_RATES)
    for row, weight in zip(got, weights, strict=True):
        copies = np.repeat(np.arange(4), weight)
        rows = [
            [
                (copy, score)
                for copy, source in enumerate(copies)
                for case, score in pairs
                if case == source
            ]
            for pairs in (
                list(zip(BY_HAND.lesion_case, BY_HAND.lesion_score, strict=True)),
                list(zip(BY_HAND.false_case, BY_HAND.false_score, strict=True)),
            )
        ]
        expected = sensitivity_at(froc_curve(table(rows[0], rows[1])), FROC_RATES)
        np.testing.assert_allclose(row, expected)


SCORES = st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.8, -np.inf])
PAIRS = st.tuples(st.integers(0, 3), SCORES)
FALSE = st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.8]))


@settings(max_examples=60, deadline=None)
@given(st.lists(PAIRS, min_size=1, max_size=8), st.lists(FALSE, max_size=8), FALSE)
def test_laws(lesions: list, false: list, added: tuple) -> None:
    curve = froc_curve(table(lesions, false))
    assert (np.diff(curve.fp_per_scan) >= 0).all()
    assert (np.diff(curve.sensitivity) >= 0).all()
    worse = froc_curve(table(lesions, [*false, added]))
    moved = froc_curve(table(lesions[::-1], false[::-1]))
    for kind in ("linear", "step"):
        before = sensitivity_at(curve, FROC_RATES, kind)
        assert (sensitivity_at(worse, FROC_RATES, kind) <= before + 1e-12).all()
        np.testing.assert_array_equal(sensitivity_at(moved, FROC_RATES, kind), before)


@settings(max_examples=40, deadline=None)
@given(st.lists(PAIRS, max_size=8), st.lists(FALSE, max_size=8), st.sampled_from((0, 0.25, 1)))
def test_operating_point_agrees_with_the_step_curve(
    lesions: list, false: list, rate: float
) -> None:
    data = table(lesions, false)
    threshold = operating_threshold(data, rate)
    assert (data.false_score >= threshold).sum() / 4 <= rate
    step = sensitivity_at(froc_curve(data), rate, "step")[0]
    if lesions:
        assert (data.lesion_score >= threshold).mean() == pytest.approx(step)


def _rows(path: Path) -> dict[str, np.ndarray]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as stream:
        grouped = defaultdict(list)
        for series, *values in list(csv.reader(stream))[1:]:
            grouped[series].append([float(value) for value in values])
    return defaultdict(lambda: np.zeros((0, 4)), {k: np.array(v) for k, v in grouped.items()})


@pytest.fixture(scope="module")
def luna16() -> tuple[list[str], dict, dict, dict]:
    if not LUNA16.is_dir():
        pytest.skip("the LUNA16 reference data are not here")
    series = (LUNA16 / "seriesuids.csv").read_text().split()
    names = ("annotations.csv", "annotations_excluded.csv.gz", "detections_dpn26.csv.gz")
    nodules, excluded, candidates = (_rows(LUNA16 / name) for name in names)
    return series, nodules, excluded, candidates


def _luna16_matches(data: tuple, limit: int) -> tuple[list[ScanMatch], int]:
    series, nodules, excluded, candidates = data
    matches, dropped = [], 0
    for name in series:
        found = candidates[name][keep_top(candidates[name][:, 3], limit)]
        spared = excluded[name]
        diameters = np.where(spared[:, 3] < 0, 10.0, spared[:, 3])
        ignored = hits_by_distance(found[:, :3], spared[:, :3], diameters)
        hits = hits_by_distance(found[:, :3], nodules[name][:, :3], nodules[name][:, 3])
        matches.append(match_hits(found[:, 3], hits, ignored.any(axis=1)))
        dropped += int(ignored.sum())
    return matches, dropped


def test_published_figures_of_luna16(luna16: tuple) -> None:
    curve = froc_curve(make_table(_luna16_matches(luna16, 100)[0]))
    published = [0.6922, 0.7690, 0.8238, 0.8651, 0.8929, 0.9174, 0.9334]
    assert sensitivity_at(curve, FROC_RATES).round(4).tolist() == published
    assert competition_metric(curve) == pytest.approx(0.841966, abs=5e-7)


def test_published_counts_of_luna16(luna16: tuple) -> None:
    matches, dropped = _luna16_matches(luna16, 10**6)
    outcome = np.concatenate([match.outcome for match in matches])
    counts = [int((outcome == kind).sum()) for kind in Outcome]
    assert counts[Outcome.HIT] == 1136
    assert counts[Outcome.FALSE_POSITIVE] == 48907
    assert counts[Outcome.EXTRA] == 190
    assert dropped == 19315
    assert np.isinf(make_table(matches).lesion_score).sum() == 50


def test_bootstrap_of_55677_candidates_brackets_the_published_value(luna16: tuple) -> None:
    matches, _ = _luna16_matches(luna16, 100)
    draws = sensitivity_draws(make_table(matches), draw_weights(luna16[0], 100), FROC_RATES)
    low, high = np.percentile(draws.mean(axis=1), [2.5, 97.5])
    assert 0.80 < low < 0.841966 < high < 0.88
