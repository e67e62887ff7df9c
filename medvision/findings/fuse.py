"""Boxes of several looks at one scan -> one set of boxes: fused where they agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvision.boxes import Cluster, cluster_views
from medvision.findings.merge import SliceDetections


def fuse_looks(
    looks: Sequence[SliceDetections],
    overlap: float,
    lowest: float = 0.0,
    largest: Sequence[tuple[float, float]] | None = None,
) -> SliceDetections:
    """Fuse the boxes of all ``looks`` at a scan that lie on one slice and overlap by more than ``overlap``.

    Boxes are means weighted by score, scores those of :func:`cluster_views`. The class is what the first of
    the looks that see the lesion says, and the outline is that of the best box. What then scores less
    than ``lowest`` is left out. All looks are in the scan's own pixels, and so are the width and height of
    the ``largest`` box on which each of them has a vote; by default each votes on all.
    """
    if len(looks) == 1:
        return looks[0]
    found = _join(looks)
    look = np.repeat(np.arange(len(looks)), [len(one.scores) for one in looks])
    limits = np.full((len(looks), 2), np.inf) if largest is None else np.array(largest, dtype=float)
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    votes: NDArray[np.bool_] = np.all(sides[:, None] <= limits[None], axis=2)
    clusters = [
        cluster
        for plane in np.unique(found.slice_index)
        for cluster in _on_slice(found, look, votes, int(plane), overlap)
        if cluster.score >= lowest
    ]
    best = np.array([cluster.rows[0] for cluster in clusters], dtype=np.int64)
    # Rows come by falling score, and the sort is stable: the best box of the first look that has one.
    named = [cluster.rows[np.argsort(look[cluster.rows], kind="stable")[0]] for cluster in clusters]
    means = [
        np.average(found.boxes[rows], axis=0, weights=found.scores[rows] + 1e-12)
        for rows, _ in clusters
    ]
    return SliceDetections(
        found.slice_index[best],
        np.array(means).reshape(-1, 4),
        np.array([cluster.score for cluster in clusters]),
        found.class_probabilities[np.array(named, dtype=np.int64)],
        tuple(found.outlines[row] for row in best) if found.outlines else (),
    )


def _join(looks: Sequence[SliceDetections]) -> SliceDetections:
    return SliceDetections(
        np.concatenate([look.slice_index for look in looks]),
        np.concatenate([look.boxes for look in looks]),
        np.concatenate([look.scores for look in looks]),
        np.concatenate([look.class_probabilities for look in looks]),
        tuple(outline for look in looks for outline in look.outlines),
    )


def _on_slice(
    found: SliceDetections,
    look: NDArray[np.int64],
    votes: NDArray[np.bool_],
    plane: int,
    overlap: float,
) -> list[Cluster]:
    rows = np.flatnonzero(found.slice_index == plane)
    clusters = cluster_views(
        found.boxes[rows], found.scores[rows], look[rows], votes.shape[1], overlap, votes[rows]
    )
    return [Cluster(rows[cluster.rows], cluster.score) for cluster in clusters]
