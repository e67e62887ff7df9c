"""Boxes of single slices -> lesions in 3-D."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medvision.boxes import pairwise_iou
from medvision.findings.config import PredictConfig
from medvision.findings.outline import Outline


@dataclass(frozen=True)
class SliceDetections:
    """The detector's boxes of all slices of one scan, in pixel edges of the scan.

    ``boxes`` is ``[n, 4]`` x1, y1, x2, y2 (x = column), ``slice_index``, ``scores`` ``[n]``,
    ``class_probabilities`` ``[n, classes]``. ``outlines`` has one for each box, or is empty for a model
    that draws none.
    """

    slice_index: NDArray[np.int64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    class_probabilities: NDArray[np.float64]
    outlines: tuple[Outline, ...] = ()

    def scaled(self, height: float, width: float) -> SliceDetections:
        """Return them on slices with ``height`` times as many rows and ``width`` as many columns."""
        return replace(
            self,
            boxes=self.boxes * np.array([width, height, width, height]),
            outlines=tuple(outline.scaled(height, width) for outline in self.outlines),
        )


@dataclass(frozen=True)
class LinkedLesion:
    """Rows of a :class:`SliceDetections` that are one lesion, by slice, and its score."""

    members: NDArray[np.int64]
    score: float


def link_slices(
    detections: SliceDetections, config: PredictConfig, depth: int = 1
) -> list[LinkedLesion]:
    """Group the boxes of a scan into lesions, by falling score.

    The best free box starts a lesion; upwards and downwards the free box that overlaps the last one most
    joins it, as long as the IoU reaches ``link_iou`` and the score ``link_score_ratio`` of the first's,
    over at most ``link_gap`` empty slices. Free boxes that lie over the lesion are then used up,
    so that nothing is reported twice.

    A lesion's score is the mean of its ``depth`` best boxes, missing ones counted as 0: a lesion
    of a few mm still shows on the slices next to its own, noise and a vessel's crossing do not, so on
    thin slices one box alone is weak evidence.
    """
    free = np.ones(len(detections.scores), dtype=bool)
    by_slice = _rows_by_slice(detections.slice_index)
    lesions = []
    for seed in np.argsort(-detections.scores, kind="stable"):
        if not free[seed]:
            continue
        members = _grow(int(seed), detections, by_slice, free, config)
        _use_up(members, detections, by_slice, free, config)
        best = np.sort(detections.scores[members])[::-1][:depth]
        lesions.append(LinkedLesion(members, float(best.sum() / depth)))
    lesions.sort(key=lambda lesion: -lesion.score)
    return lesions


def _rows_by_slice(slice_index: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    if len(slice_index) == 0:
        return {}
    order = np.argsort(slice_index, kind="stable")
    values, starts = np.unique(slice_index[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))


def _grow(
    seed: int,
    detections: SliceDetections,
    by_slice: dict[int, NDArray[np.int64]],
    free: NDArray[np.bool_],
    config: PredictConfig,
) -> NDArray[np.int64]:
    lowest = detections.scores[seed] * config.link_score_ratio
    members = [seed]
    for step in (-1, 1):
        last, position = seed, int(detections.slice_index[seed])
        gap = 0
        while gap <= config.link_gap:
            position += step
            rows = by_slice.get(position, np.empty(0, dtype=np.int64))
            rows = rows[free[rows] & (detections.scores[rows] >= lowest)]
            overlap = pairwise_iou(detections.boxes[last][None], detections.boxes[rows])[0]
            if len(rows) and overlap.max() >= config.link_iou:
                last, gap = int(rows[overlap.argmax()]), 0
                members.append(last)
            else:
                gap += 1
    rows = np.array(members)
    return rows[np.argsort(detections.slice_index[rows], kind="stable")]


def _use_up(
    members: NDArray[np.int64],
    detections: SliceDetections,
    by_slice: dict[int, NDArray[np.int64]],
    free: NDArray[np.bool_],
    config: PredictConfig,
) -> None:
    free[members] = False
    for member in members:
        position = int(detections.slice_index[member])
        for near in range(position - config.link_gap - 1, position + config.link_gap + 2):
            rows = by_slice.get(near)
            if rows is None:
                continue
            overlap = pairwise_iou(detections.boxes[member][None], detections.boxes[rows])[0]
            free[rows[overlap >= config.link_iou]] = False
