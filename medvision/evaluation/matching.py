"""Which finding hits which reference lesion, scan by scan.

Rule ``center`` is that of LUNA16 (Setio et al. 2017, doi:10.1016/j.media.2017.06.015): a finding
hits a lesion when its centre lies closer to the lesion's centre than the lesion's radius,
``distance < diameter / 2``. LUNA16 gives every nodule as a sphere; a mask has several diameters.
The one taken here is that of the sphere with the mask's volume: the sphere of the hit then covers
as much tissue as the lesion does, where a sphere over the longest diameter of a long, thin lesion
would mostly cover healthy tissue. So that such a lesion is not missed at its ends, a centre in a
voxel of the mask is a hit as well. There is no smallest radius: a lesion of one voxel is hit by a
centre in that voxel.

As LUNA16 counts: a lesion is found by its highest-scoring hit, further hits are neither true nor
false positives, one finding may find two lesions that overlap, and a finding that hits nothing
but an ignored region is dropped.

Rule ``iou`` is that of COCO (Lin et al. 2014, arXiv:1405.0312) on 3-D boxes: by falling score each
finding takes the free lesion that it overlaps most, if the intersection over union reaches the
threshold; a finding without a lesion is a false positive, a second one on a taken lesion too. A
finding that covers an ignored region with this share of its own volume is dropped (COCO's crowd).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvision.evaluation.case import CaseResult, center_mm, contains, equivalent_diameter_mm
from medvision.findings.finding import Finding
from medvision.geometry import Box
from medvision.labels.annotation import Annotation


class Outcome(IntEnum):
    """What a finding counts as. EXTRA: a further hit on a lesion that a better finding found."""

    FALSE_POSITIVE = 0
    HIT = 1
    EXTRA = 2
    IGNORED = 3


@dataclass(frozen=True)
class ScanMatch:
    """The findings of one scan against its lesions.

    ``outcome[finding]`` is an Outcome; ``found_by[lesion]`` is the position of the finding that
    found it, -1 for none; ``scores[finding]`` ranks the findings.
    """

    scores: NDArray[np.float64]
    outcome: NDArray[np.int8]
    found_by: NDArray[np.int64]

    @property
    def lesion_scores(self) -> NDArray[np.float64]:
        """The score at which each lesion is found; minus infinity where nothing hits it."""
        found = np.full(len(self.found_by), -np.inf)
        hit = self.found_by >= 0
        found[hit] = self.scores[self.found_by[hit]]
        return found

    @property
    def false_scores(self) -> NDArray[np.float64]:
        """The scores of the false positives."""
        return self.scores[self.outcome == Outcome.FALSE_POSITIVE]


def hits_by_distance(
    points_mm: ArrayLike, centers_mm: ArrayLike, diameters_mm: ArrayLike
) -> NDArray[np.bool_]:
    """Tell which points ``[n, 3]`` lie within which spheres ``[m]``, ``[n, m]``: LUNA16's rule."""
    points = np.asarray(points_mm, dtype=float).reshape(-1, 1, 3)
    centers = np.asarray(centers_mm, dtype=float).reshape(1, -1, 3)
    squared = ((points - centers) ** 2).sum(axis=2)
    return squared < (np.asarray(diameters_mm, dtype=float).reshape(1, -1) / 2) ** 2


def match_hits(
    scores: ArrayLike, hits: NDArray[np.bool_], on_ignored: NDArray[np.bool_]
) -> ScanMatch:
    """Match by rule ``center``: ``hits[finding, lesion]``, ``on_ignored[finding]``.

    Of findings with equal scores the first in the arrays counts as the one that found the lesion.
    """
    values = np.asarray(scores, dtype=float)
    ranked = np.where(hits, values[:, None], -np.inf)
    found_by = np.full(hits.shape[1], -1, dtype=np.int64)
    if hits.size:
        found_by = np.where(hits.any(axis=0), ranked.argmax(axis=0), -1)
    outcome = np.where(on_ignored, Outcome.IGNORED, Outcome.FALSE_POSITIVE).astype(np.int8)
    outcome[hits.any(axis=1)] = Outcome.EXTRA
    outcome[found_by[found_by >= 0]] = Outcome.HIT
    return ScanMatch(values, outcome, found_by)


def match_overlaps(
    scores: ArrayLike,
    overlaps: NDArray[np.float64],
    on_ignored: NDArray[np.bool_],
    threshold: float,
) -> ScanMatch:
    """Match by rule ``iou``: ``overlaps[finding, lesion]`` is the intersection over union.

    Findings with equal scores are taken in the order of the arrays; of equal overlaps the last one
    is taken, as COCO does.
    """
    values = np.asarray(scores, dtype=float)
    outcome = np.where(on_ignored, Outcome.IGNORED, Outcome.FALSE_POSITIVE).astype(np.int8)
    found_by = np.full(overlaps.shape[1], -1, dtype=np.int64)
    for finding in np.argsort(-values, kind="stable"):
        free = np.where(found_by < 0, overlaps[finding], -1.0)
        if free.size and free.max() >= threshold:
            lesion = len(free) - 1 - int(free[::-1].argmax())
            found_by[lesion] = finding
            outcome[finding] = Outcome.HIT
    return ScanMatch(values, outcome, found_by)


def keep_top(scores: ArrayLike, limit: int) -> NDArray[np.bool_]:
    """Mark at most ``limit`` findings of a scan: those scored above the best one that is left out.

    LUNA16 takes 100 a scan this way, so that findings with equal scores stay or go together.
    """
    values = np.asarray(scores, dtype=float)
    if len(values) <= limit:
        return np.ones(len(values), dtype=bool)
    return values > np.sort(values)[::-1][limit]


def findings_of(case: CaseResult, class_name: str | None = None) -> tuple[Finding, ...]:
    """Return the findings in order of their number; with ``class_name`` only those named so."""
    chosen = (item for item in case.findings if class_name in (None, item.class_name))
    return tuple(sorted(chosen, key=lambda item: item.finding_id))


def lesions_of(case: CaseResult, class_name: str | None = None) -> tuple[Annotation, ...]:
    """Return the reference lesions in their order; with ``class_name`` only those of that class."""
    return tuple(item for item in case.lesions if class_name in (None, item.class_name))


def match_centers(case: CaseResult, class_name: str | None = None) -> ScanMatch:
    """Match a scan by rule ``center``: findings_of(...) against lesions_of(...)."""
    findings = findings_of(case, class_name)
    points = np.array([item.center_mm for item in findings], dtype=float).reshape(-1, 3)
    hits = center_hits(case, points, lesions_of(case, class_name))
    on_ignored = np.any(center_hits(case, points, case.ignored), axis=1)
    return match_hits(_scores(findings, class_name), hits, on_ignored)


def match_boxes(case: CaseResult, threshold: float, class_name: str | None = None) -> ScanMatch:
    """Match a scan by rule ``iou``: findings_of(...) against lesions_of(...)."""
    findings = findings_of(case, class_name)
    boxes = _edges([item.box for item in findings])
    overlaps = box_iou(boxes, _edges([item.box for item in lesions_of(case, class_name)]))
    ignored = _intersections(boxes, _edges([item.box for item in case.ignored]))
    covered = ignored / np.maximum(_volumes(boxes), 1e-12)[:, None]
    on_ignored = np.any(covered >= threshold, axis=1)
    return match_overlaps(_scores(findings, class_name), overlaps, on_ignored, threshold)


def center_hits(
    case: CaseResult, points_mm: NDArray[np.float64], lesions: Sequence[Annotation]
) -> NDArray[np.bool_]:
    """Tell which points ``[n, 3]`` hit which lesions, ``[n, lesions]``: the sphere or the mask."""
    centers = [center_mm(item, case.affine) for item in lesions]
    diameters = [equivalent_diameter_mm(item, case.affine) for item in lesions]
    hits = hits_by_distance(points_mm, centers, diameters)
    for column, lesion in enumerate(lesions):
        hits[:, column] |= contains(lesion, case.affine, points_mm)
    return hits


def box_iou(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the intersection over union of boxes ``[n, 6]`` and ``[m, 6]``, ``[n, m]``.

    A box is (slice_min, row_min, column_min, slice_max, row_max, column_max) in voxel edges. Both
    come from one grid, so the ratio in voxels is the ratio in mm3.
    """
    shared = _intersections(first, second)
    union = _volumes(first)[:, None] + _volumes(second)[None] - shared
    return shared / np.maximum(union, 1e-12)


def _intersections(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    low = np.maximum(first[:, None, :3], second[None, :, :3])
    high = np.minimum(first[:, None, 3:], second[None, :, 3:])
    return np.clip(high - low, 0, None).prod(axis=2)


def _volumes(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[:, 3:] - boxes[:, :3]).prod(axis=1)


def _edges(boxes: Sequence[Box]) -> NDArray[np.float64]:
    edges = [np.concatenate([box.lower, box.upper]) for box in boxes]
    return np.array(edges, dtype=float).reshape(-1, 6)


def _scores(findings: Sequence[Finding], class_name: str | None) -> NDArray[np.float64]:
    if class_name is None:
        return np.array([item.score for item in findings], dtype=float)
    scores = [item.class_scores.get(class_name, item.score) for item in findings]
    return np.array(scores, dtype=float)
