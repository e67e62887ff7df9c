"""Boxes of several looks at one scan -> one set of boxes: fused where they agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvision.findings.merge import SliceDetections, pairwise_iou


def fuse_looks(
    looks: Sequence[SliceDetections], overlap: float, lowest: float = 0.0
) -> SliceDetections:
    """Fuse the boxes of all ``looks`` at a scan that lie on one slice and overlap by more than ``overlap``.

    Weighted boxes fusion (Solovyev et al., Image and Vision Computing 2021): boxes are means weighted by
    score. The score is the mean over the looks of the best score in each, 0 where a look has none, so that
    a box which one look alone sees counts for little. The class is what the first of the looks that see the
    lesion says, and the outline is that of the best box. What then scores less than ``lowest`` is left
    out. All looks are in the scan's own pixels.
    """
    if len(looks) == 1:
        return looks[0]
    together = _join(looks)
    number = np.repeat(np.arange(len(looks)), [len(look.scores) for look in looks])
    clusters = [
        rows
        for plane in np.unique(together.slice_index)
        for rows in _clusters(together, np.flatnonzero(together.slice_index == plane), overlap)
    ]
    scores = np.array([_mean_score(together, number, rows, len(looks)) for rows in clusters])
    kept = [index for index in range(len(clusters)) if scores[index] >= lowest]
    chosen = [clusters[index] for index in kept]
    lead = np.array([rows[0] for rows in chosen], dtype=np.int64)
    # Rows come by falling score, and the sort is stable: the best box of the first look that has one.
    named = [rows[np.argsort(number[rows], kind="stable")[0]] for rows in chosen]
    return SliceDetections(
        together.slice_index[lead],
        _weighted(together.boxes, together.scores, chosen).reshape(-1, 4),
        scores[kept] if kept else np.empty(0),
        together.class_probabilities[np.array(named, dtype=np.int64)],
        tuple(together.outlines[row] for row in lead) if together.outlines else (),
    )


def _join(looks: Sequence[SliceDetections]) -> SliceDetections:
    return SliceDetections(
        np.concatenate([look.slice_index for look in looks]),
        np.concatenate([look.boxes for look in looks]),
        np.concatenate([look.scores for look in looks]),
        np.concatenate([look.class_probabilities for look in looks]),
        tuple(outline for look in looks for outline in look.outlines),
    )


def _clusters(
    found: SliceDetections, rows: NDArray[np.int64], overlap: float
) -> list[NDArray[np.int64]]:
    """Group the boxes ``rows`` of one slice around the best free one; each group by falling score."""
    ranked = rows[np.argsort(-found.scores[rows], kind="stable")]
    overlaps = pairwise_iou(found.boxes[ranked], found.boxes[ranked])
    free = np.ones(len(ranked), dtype=bool)
    clusters = []
    for seed in range(len(ranked)):
        if free[seed]:
            group = free & (overlaps[seed] > overlap)
            group[seed] = True
            free &= ~group
            clusters.append(ranked[group])
    return clusters


def _mean_score(
    found: SliceDetections, number: NDArray[np.int64], rows: NDArray[np.int64], looks: int
) -> float:
    best = np.zeros(looks)
    np.maximum.at(best, number[rows], found.scores[rows])
    return float(best.mean())


def _weighted(
    values: NDArray[np.float64], scores: NDArray[np.float64], clusters: list[NDArray[np.int64]]
) -> NDArray[np.float64]:
    means = [np.average(values[rows], axis=0, weights=scores[rows] + 1e-12) for rows in clusters]
    return np.array(means)
