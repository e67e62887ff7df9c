"""Resampling scans: whole patients, the same draws for a seed, intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from medvision.evaluation.bootstrap import draw_weights, estimate, percentile_interval


def test_every_draw_has_as_many_scans_and_the_seed_fixes_it() -> None:
    weights = draw_weights(list("abcde"), 200, seed=5)
    assert weights.shape == (200, 5)
    assert (weights.sum(axis=1) == 5).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(5), abs=0.25)
    np.testing.assert_array_equal(weights, draw_weights(list("abcde"), 200, seed=5))
    assert (weights != draw_weights(list("abcde"), 200, seed=6)).any()


def test_scans_of_a_patient_come_together() -> None:
    weights = draw_weights(["a", "b", "a", "c"], 100)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    assert ((weights[:, 0] + weights[:, 1] + weights[:, 3]) == 3).all()


def test_no_scans_and_no_draws() -> None:
    assert draw_weights([], 3).shape == (3, 0)
    assert draw_weights(["a"], 0).shape == (0, 1)


def test_percentiles_leave_undefined_draws_out() -> None:
    values = np.append(np.arange(101) / 100, np.nan)
    assert percentile_interval(values) == pytest.approx((0.025, 0.975))
    assert percentile_interval(np.array([np.nan])) is None
    assert percentile_interval(np.zeros(0)) is None


def test_interval_of_a_share_is_close_to_the_binomial_one() -> None:
    right = np.arange(200) < 140
    weights = draw_weights([str(number) for number in range(200)], 2000)
    low, high = percentile_interval((weights * right).sum(axis=1) / 200) or (0, 0)
    spread = 1.96 * np.sqrt(0.7 * 0.3 / 200)
    assert (low, high) == pytest.approx((0.7 - spread, 0.7 + spread), abs=0.015)


def test_one_patient_alone_gives_no_interval() -> None:
    weights = draw_weights(["a", "b", "b"], 50)
    values = np.linspace(0, 1, 50)
    assert estimate(0.5, values, weights, np.array([1, 2])).low is None
    assert estimate(0.5, values, weights, np.array([0, 1])).low is not None
    assert estimate(0.5, values[:0], weights[:0], np.array([0, 1])).low is None
    assert estimate(None, values, weights, np.array([0, 1])).value is None
    assert estimate(float("nan"), values, weights, np.array([0, 1])).value is None
