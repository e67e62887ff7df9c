"""Confidence intervals by resampling scans (Efron's percentile bootstrap).

Lesions of one scan and scans of one patient are not independent, so what is drawn with
replacement is the patient, or the scan where patients are not known. The matching does not depend
on what else is drawn: a draw only weighs every scan by how often it came.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvision.evaluation.results import Estimate


def draw_weights(groups: Sequence[str], draws: int, seed: int = 0) -> NDArray[np.int64]:
    """Return how often each scan is in each draw, ``[draws, scans]``.

    ``groups`` names the patient of every scan; as many patients are drawn as there are. The same
    ``seed`` gives the same draws for the same order of scans.
    """
    names, number = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) == 0:
        return np.zeros((draws, 0), dtype=np.int64)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return counts[:, number.ravel()].astype(np.int64)


def percentile_interval(
    values: NDArray[np.float64], level: float = 0.95
) -> tuple[float, float] | None:
    """Return the central ``level`` interval of the draws; None if no draw is defined (all NaN)."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return None
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def estimate(
    value: float | None,
    draws: NDArray[np.float64],
    weights: NDArray[np.int64],
    bearing: NDArray[np.int64],
) -> Estimate:
    """Return ``value`` with the 95 % interval of ``draws``; None where it is undefined.

    ``bearing`` lists the scans that bear on the value. If they are all of one patient, resampling
    says nothing about how it would vary and there is no interval.
    """
    if value is None or np.isnan(value):
        return Estimate(None)
    columns = weights[:, bearing]
    if columns.size == 0 or (columns == columns[:, :1]).all():
        return Estimate(float(value))
    return Estimate(float(value), *(percentile_interval(draws) or (None, None)))
