"""What became of every lesion and every finding at one score threshold, and tables of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from medvision.evaluation.bootstrap import estimate
from medvision.evaluation.case import CaseResult, center_mm, longest_diameter_mm
from medvision.evaluation.froc import (
    DetectionTable,
    make_table,
    operating_threshold,
    sensitivity_draws,
)
from medvision.evaluation.matching import Outcome, ScanMatch, findings_of, match_centers
from medvision.evaluation.results import (
    Confusion,
    FalsePositiveResult,
    LesionResult,
    OperatingPoint,
    SizeResult,
)
from medvision.findings.finding import Finding
from medvision.geometry import Affine
from medvision.labels.annotation import Annotation

SIZE_EDGES_MM = (0.0, 6.0, 8.0, 15.0)
"""Lower edges of the size bins: the Fleischner Society's 6 and 8 mm, Lung-RADS' 15 mm."""


@dataclass(frozen=True)
class Matched:
    """Scans with their matches by rule ``center``, in one order, and the draws of the bootstrap.

    ``lesions`` and ``table.lesion_*`` list all lesions scan by scan. ``weights[draw, scan]``.
    """

    cases: tuple[CaseResult, ...]
    matches: tuple[ScanMatch, ...]
    table: DetectionTable
    lesions: tuple[Annotation, ...]
    weights: NDArray[np.int64]


def match_all(cases: tuple[CaseResult, ...], weights: NDArray[np.int64]) -> Matched:
    """Match every scan, whatever the classes."""
    matches = tuple(match_centers(case) for case in cases)
    lesions = tuple(lesion for case in cases for lesion in case.lesions)
    return Matched(cases, matches, make_table(matches), lesions, weights)


def operating_point(matched: Matched, target: float) -> OperatingPoint:
    """Return what the lowest threshold with at most ``target`` false positives per scan gives."""
    table = matched.table
    threshold = operating_threshold(table, target)
    false = table.false_case[table.false_score >= threshold]
    healthy = np.array([case.healthy for case in matched.cases], dtype=bool)
    in_healthy = int(healthy[false].sum())
    detected = int((table.lesion_score >= threshold).sum())
    shown = sum(int((match.scores >= threshold).sum()) for match in matched.matches)
    hits = sum(
        int((match.scores[match.outcome == Outcome.HIT] >= threshold).sum())
        for match in matched.matches
    )
    return OperatingPoint(
        target_fp_per_scan=target,
        threshold=threshold if np.isfinite(threshold) else None,
        findings=shown,
        detected=detected,
        missed=len(table.lesion_score) - detected,
        false_positives=len(false),
        fp_per_scan=len(false) / len(matched.cases),
        fp_per_healthy_scan=_ratio(in_healthy, int(healthy.sum())),
        fp_per_diseased_scan=_ratio(len(false) - in_healthy, int((~healthy).sum())),
        sensitivity=estimate(
            _ratio(detected, len(table.lesion_score)),
            sensitivity_draws(table, matched.weights, target, "step")[:, 0],
            matched.weights,
            table.lesion_case,
        ),
        ppv=_ratio(hits, hits + len(false)),
    )


def size_results(
    matched: Matched, point: OperatingPoint, lesions: Sequence[LesionResult]
) -> tuple[SizeResult, ...]:
    """Return the sensitivity at the operating point by size of the lesion."""
    sizes = np.array([item.diameter_mm for item in lesions], dtype=float)
    found = matched.table.lesion_score >= threshold_of(point)
    results = []
    for low, high in pairwise((*SIZE_EDGES_MM, np.inf)):
        chosen = (sizes >= low) & (sizes < high)
        part = matched.table.select_lesions(chosen)
        draws = sensitivity_draws(part, matched.weights, point.target_fp_per_scan, "step")
        detected, total = int(found[chosen].sum()), int(chosen.sum())
        results.append(
            SizeResult(
                low_mm=low,
                high_mm=high if np.isfinite(high) else None,
                lesions=total,
                detected=detected,
                sensitivity=estimate(
                    _ratio(detected, total), draws[:, 0], matched.weights, part.lesion_case
                ),
            )
        )
    return tuple(results)


def lesion_results(matched: Matched, point: OperatingPoint) -> tuple[LesionResult, ...]:
    """Return what became of every reference lesion, scan by scan."""
    return tuple(
        _lesion_result(case, lesion, _at(findings_of(case), int(found)), threshold_of(point))
        for case, match in zip(matched.cases, matched.matches, strict=True)
        for lesion, found in zip(case.lesions, match.found_by, strict=True)
    )


def false_positive_results(
    matched: Matched, point: OperatingPoint
) -> tuple[FalsePositiveResult, ...]:
    """Return the false positives kept at the operating point, worst first."""
    results = [
        FalsePositiveResult(
            case_id=case.case_id,
            finding_id=finding.finding_id,
            class_name=finding.class_name,
            score=finding.score,
            diameter_mm=finding.diameter_mm,
            healthy=case.healthy,
        )
        for case, match in zip(matched.cases, matched.matches, strict=True)
        for finding, outcome in zip(findings_of(case), match.outcome, strict=True)
        if outcome == Outcome.FALSE_POSITIVE and finding.score >= threshold_of(point)
    ]
    return tuple(sorted(results, key=lambda item: (-item.score, item.case_id, item.finding_id)))


def confusion(
    matched: Matched, lesions: Sequence[LesionResult], class_names: Sequence[str]
) -> Confusion:
    """Return the class that each lesion found was given, by the finding that found it."""
    found = [item for item in lesions if item.detected]
    pairs = [(item.class_name, str(item.predicted_class)) for item in found]
    predicted = tuple(dict.fromkeys([*class_names, *sorted(name for _, name in pairs)]))
    counts = tuple(
        tuple(sum(pair == (row, column) for pair in pairs) for column in predicted)
        for row in class_names
    )
    totals = {name: sum(row) for name, row in zip(class_names, counts, strict=True)}
    majority = max(class_names, key=lambda name: totals[name]) if found else None
    number = {case.case_id: index for index, case in enumerate(matched.cases)}
    where = np.array([number[item.case_id] for item in found], dtype=np.int64)
    right = np.array([row == column for row, column in pairs], dtype=float)
    weights = matched.weights[:, where]
    with np.errstate(invalid="ignore"):  # a draw without any of these scans is 0 / 0
        draws = (weights * right).sum(axis=1) / weights.sum(axis=1)
    return Confusion(
        reference_classes=tuple(class_names),
        predicted_classes=predicted,
        counts=counts,
        accuracy=estimate(_ratio(int(right.sum()), len(found)), draws, matched.weights, where),
        majority_class=majority,
        majority_accuracy=_ratio(totals[majority], len(found)) if majority else None,
    )


def threshold_of(point: OperatingPoint) -> float:
    """Return the threshold as a number: infinity where no finding is kept."""
    return np.inf if point.threshold is None else point.threshold


def _lesion_result(
    case: CaseResult, lesion: Annotation, finding: Finding | None, threshold: float
) -> LesionResult:
    center = center_mm(lesion, case.affine)
    nearest, distance = (None, None) if finding else _nearest(case, center)
    return LesionResult(
        case_id=case.case_id,
        label=lesion.label,
        class_name=lesion.class_name,
        diameter_mm=longest_diameter_mm(lesion, case.affine),
        detected=finding is not None and finding.score >= threshold,
        finding_id=finding.finding_id if finding else None,
        score=finding.score if finding else None,
        predicted_class=finding.class_name if finding else None,
        nearest_finding_id=nearest.finding_id if nearest else None,
        nearest_score=nearest.score if nearest else None,
        nearest_mm=distance,
    )


def _nearest(case: CaseResult, center: Affine) -> tuple[Finding | None, float | None]:
    findings = findings_of(case)
    if not findings:
        return None, None
    gaps = np.linalg.norm(np.array([item.center_mm for item in findings]) - center, axis=1)
    return findings[int(gaps.argmin())], float(gaps.min())


def _at(findings: Sequence[Finding], position: int) -> Finding | None:
    return findings[position] if position >= 0 else None


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
