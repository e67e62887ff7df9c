"""Boxes x1, y1, x2, y2 of one slice: how much they overlap, and which boxes of several views are one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Cluster(NamedTuple):
    """Boxes that are one: their ``rows`` by falling score, and the ``score`` of all together, 0..1."""

    rows: NDArray[np.int64]
    score: float


def pairwise_iou(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return ``[n, m]`` IoU of boxes x1, y1, x2, y2; 0 where both are empty."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    area_first = np.clip(first[:, 2:] - first[:, :2], 0, None).prod(axis=1)
    area_second = np.clip(second[:, 2:] - second[:, :2], 0, None).prod(axis=1)
    union = area_first[:, None] + area_second[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def cluster_views(
    boxes: NDArray[np.floating],
    scores: NDArray[np.floating],
    view: NDArray[np.integer],
    views: int,
    overlap: float,
    votes: NDArray[np.bool_] | None = None,
) -> list[Cluster]:
    """Group ``boxes[n, 4]`` of one slice around the best free one, by an IoU of more than ``overlap``.

    Weighted boxes fusion (Solovyev et al., Image and Vision Computing 2021): the score of a group is the
    mean over all ``views`` of the best score in each, 0 where a view has none, so that a box which one
    view alone sees counts for little. ``view[n]`` is the number of the view that a box is from.
    ``votes[n, views]`` names the views that have a say on a box like this one, all by default: on the best box
    of a group it decides whose boxes count for the group, and no view starts a group on a box that it has
    no say on.
    """
    if votes is None:
        votes = np.ones((len(scores), views), dtype=bool)
    ranked = np.argsort(-scores, kind="stable")
    overlaps = pairwise_iou(boxes[ranked], boxes[ranked])
    own = votes[ranked, view[ranked]]
    free = np.ones(len(ranked), dtype=bool)
    clusters = []
    for seed in range(len(ranked)):
        if free[seed] and own[seed]:
            group = free & (overlaps[seed] > overlap)
            group[seed] = True
            free &= ~group
            voting = votes[ranked[seed]]
            rows = ranked[group]
            rows = rows[voting[view[rows]]]
            best = np.zeros(views)
            np.maximum.at(best, view[rows], scores[rows])
            clusters.append(Cluster(rows, float(best[voting].mean())))
    return clusters
