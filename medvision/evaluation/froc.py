"""Free-response ROC: sensitivity against false positives per scan (Bunch et al. 1977).

A threshold takes every finding with that score or a higher one, so findings with equal scores come
and go together. The competition performance metric (CPM) of LUNA16 is the mean sensitivity at 1/8,
1/4, 1/2, 1, 2, 4 and 8 false positives per scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvision.evaluation.matching import ScanMatch

FROC_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""The false positives per scan at which LUNA16 reads the curve."""

Interpolation = Literal["linear", "step"]

_CHUNK_VALUES = 2_000_000


@dataclass(frozen=True)
class DetectionTable:
    """The scores and scans of all lesions and false positives of a set of scans.

    ``lesion_score`` is the score at which a lesion is found, minus infinity if never. The
    ``*_case`` arrays hold the position of the scan, ``0 <= case < n_cases``.
    """

    n_cases: int
    lesion_case: NDArray[np.int64]
    lesion_score: NDArray[np.float64]
    false_case: NDArray[np.int64]
    false_score: NDArray[np.float64]

    def select_lesions(self, chosen: NDArray[np.bool_]) -> DetectionTable:
        """Return the table with only the chosen lesions, and every false positive."""
        return DetectionTable(
            self.n_cases,
            self.lesion_case[chosen],
            self.lesion_score[chosen],
            self.false_case,
            self.false_score,
        )


@dataclass(frozen=True)
class FrocCurve:
    """The curve from the highest threshold (infinity: no finding) to the lowest score.

    ``sensitivity`` is NaN throughout where there is no lesion. All arrays have one length.
    """

    threshold: NDArray[np.float64]
    fp_per_scan: NDArray[np.float64]
    sensitivity: NDArray[np.float64]


def make_table(matches: Sequence[ScanMatch]) -> DetectionTable:
    """Gather the matches of many scans; the scan's position in ``matches`` becomes its number."""
    lesions = [match.lesion_scores for match in matches]
    false = [match.false_scores for match in matches]
    return DetectionTable(len(matches), *_numbered(lesions), *_numbered(false))


def froc_curve(table: DetectionTable) -> FrocCurve:
    """Return the FROC curve of a set of scans."""
    thresholds, ends = _thresholds(table)
    fp_per_scan, sensitivity = _curve_rows(table, np.ones((1, table.n_cases)), ends)
    return FrocCurve(thresholds, fp_per_scan[0], sensitivity[0])


def sensitivity_at(
    curve: FrocCurve, rates: ArrayLike, interpolation: Interpolation = "linear"
) -> NDArray[np.float64]:
    """Read the sensitivity at ``rates`` false positives per scan; NaN where there is no lesion.

    ``step``: the highest sensitivity reached with at most that many. ``linear``: between the points
    of the curve on a straight line, as the evaluation script of LUNA16 does. The two differ only
    where findings share a score; past its last point the curve goes on level.
    """
    return _read_row(curve.fp_per_scan, curve.sensitivity, rates, interpolation)


def competition_metric(curve: FrocCurve, interpolation: Interpolation = "linear") -> float:
    """Return the CPM: the mean sensitivity at FROC_RATES; NaN where there is no lesion."""
    return float(sensitivity_at(curve, FROC_RATES, interpolation).mean())


def sensitivity_draws(
    table: DetectionTable,
    weights: NDArray[np.int64],
    rates: ArrayLike,
    interpolation: Interpolation = "linear",
) -> NDArray[np.float64]:
    """Read ``rates`` on the curve of every resampled set, ``[draws, rates]``.

    ``weights[draw, case]`` says how often a scan is in the draw. A draw without a lesion is NaN.
    """
    _, ends = _thresholds(table)
    events = 1 + len(table.lesion_score) + len(table.false_score)
    size = max(1, _CHUNK_VALUES // events)
    rows = []
    for start in range(0, len(weights), size):
        curves = _curve_rows(table, weights[start : start + size], ends)
        rows += [_read_row(*row, rates, interpolation) for row in zip(*curves, strict=True)]
    return np.array(rows).reshape(len(weights), np.size(rates))


def operating_threshold(table: DetectionTable, fp_per_scan: float) -> float:
    """Return the lowest score threshold with at most ``fp_per_scan``; infinity if there is none.

    With the threshold infinite no finding is kept: there is none, or the best one is already one
    false positive too many.
    """
    curve = froc_curve(table)
    last = int(np.searchsorted(curve.fp_per_scan, fp_per_scan, side="right")) - 1
    return float(curve.threshold[last])


def _numbered(
    per_case: Sequence[NDArray[np.float64]],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    numbers = np.repeat(np.arange(len(per_case)), [len(values) for values in per_case])
    values = np.concatenate(per_case) if per_case else np.zeros(0)
    return numbers.astype(np.int64), values


def _events(table: DetectionTable) -> tuple[NDArray, NDArray, NDArray]:
    found = np.isfinite(table.lesion_score)
    scores = np.concatenate([table.lesion_score[found], table.false_score])
    cases = np.concatenate([table.lesion_case[found], table.false_case])
    is_lesion = np.arange(len(scores)) < found.sum()
    order = np.argsort(-scores, kind="stable")
    return scores[order], cases[order], is_lesion[order]


def _thresholds(table: DetectionTable) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    scores, _, _ = _events(table)
    ends = np.flatnonzero(np.append(np.diff(scores) != 0, True)) if len(scores) else scores
    ends = np.asarray(ends, dtype=np.int64)
    return np.concatenate([[np.inf], scores[ends]]), ends


def _curve_rows(
    table: DetectionTable, weights: NDArray, ends: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    _, cases, is_lesion = _events(table)
    counts = weights[:, cases].astype(float)
    false = _cumulated(np.where(is_lesion, 0.0, counts), ends)
    found = _cumulated(np.where(is_lesion, counts, 0.0), ends)
    lesions = weights[:, table.lesion_case].sum(axis=1, dtype=float)
    scans = weights.sum(axis=1, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return false / scans[:, None], found / lesions[:, None]


def _cumulated(counts: NDArray[np.float64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    totals = np.cumsum(counts, axis=1)[:, ends]
    return np.concatenate([np.zeros((len(counts), 1)), totals], axis=1)


def _read_row(
    fp_per_scan: NDArray[np.float64],
    sensitivity: NDArray[np.float64],
    rates: ArrayLike,
    interpolation: Interpolation,
) -> NDArray[np.float64]:
    wanted = np.atleast_1d(np.asarray(rates, dtype=float))
    if np.isnan(sensitivity[0]) or np.isnan(fp_per_scan[0]):
        return np.full(len(wanted), np.nan)
    if interpolation == "step":
        return sensitivity[np.searchsorted(fp_per_scan, wanted, side="right") - 1]
    return np.interp(wanted, fp_per_scan, sensitivity)
