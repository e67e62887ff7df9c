"""Average precision as COCO computes it (Lin et al. 2014, arXiv:1405.0312), on 3-D boxes.

Precision, the positive predictive value, is read at 101 recalls 0, 0.01, ..., 1 from the curve
made monotone from the right, and averaged. Findings are taken one by one by falling score; equal
scores by scan, then finding number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision.evaluation.matching import Outcome, ScanMatch

_RECALLS = np.linspace(0.0, 1.0, 101)
_CHUNK_VALUES = 2_000_000


@dataclass(frozen=True)
class RankedTable:
    """All findings of a set of scans by falling score, ignored ones left out.

    ``is_hit[finding]`` and ``finding_case[finding]`` go together; ``lesion_case`` holds the scan of
    every lesion; ``0 <= case < n_cases``.
    """

    n_cases: int
    lesion_case: NDArray[np.int64]
    finding_case: NDArray[np.int64]
    is_hit: NDArray[np.bool_]


def rank_findings(matches: Sequence[ScanMatch]) -> RankedTable:
    """Gather the matches of many scans; equal scores stay in the order of ``matches``."""
    lesions = np.repeat(np.arange(len(matches)), [len(match.found_by) for match in matches])
    cases = np.repeat(np.arange(len(matches)), [len(match.scores) for match in matches])
    scores = np.concatenate([np.zeros(0), *(match.scores for match in matches)])
    outcome = np.concatenate([np.zeros(0), *(match.outcome for match in matches)])
    order = np.argsort(-scores, kind="stable")
    order = order[outcome[order] != Outcome.IGNORED]
    return RankedTable(len(matches), lesions, cases[order], outcome[order] == Outcome.HIT)


def average_precision(table: RankedTable) -> float | None:
    """Return the AP in 0..1; None where there is no lesion (COCO writes -1)."""
    value = precision_draws(table, np.ones((1, table.n_cases), dtype=np.int64))[0]
    return None if np.isnan(value) else float(value)


def precision_draws(table: RankedTable, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the AP of every resampled set, ``[draws]``; NaN for a draw without a lesion.

    ``weights[draw, case]`` says how often a scan is in the draw.
    """
    size = max(1, _CHUNK_VALUES // (1 + len(table.is_hit)))
    parts = [
        _precision_rows(table, weights[start : start + size])
        for start in range(0, len(weights), size)
    ]
    return np.concatenate([np.zeros(0), *parts])


def _precision_rows(table: RankedTable, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    lesions = weights[:, table.lesion_case].sum(axis=1, dtype=float)
    counts = weights[:, table.finding_case].astype(float)
    hits = np.cumsum(np.where(table.is_hit, counts, 0.0), axis=1)
    taken = np.cumsum(counts, axis=1)
    precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
    # One more column of zero: the precision at every recall that is never reached.
    precision = np.pad(precision, ((0, 0), (0, 1)))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    result = np.full(len(weights), np.nan)
    for row in np.flatnonzero(lesions > 0):
        at = np.searchsorted(hits[row] / lesions[row], _RECALLS, side="left")
        result[row] = precision[row, at].mean()
    return result
