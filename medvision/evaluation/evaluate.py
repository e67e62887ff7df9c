"""Findings beside their reference -> scores: the whole evaluation of a set of scans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError, UsageError
from medvision.evaluation import breakdown
from medvision.evaluation.average_precision import (
    average_precision,
    precision_draws,
    rank_findings,
)
from medvision.evaluation.bootstrap import draw_weights, estimate, percentile_interval
from medvision.evaluation.breakdown import Matched, operating_point, threshold_of
from medvision.evaluation.case import CaseResult
from medvision.evaluation.froc import (
    FROC_RATES,
    DetectionTable,
    FrocCurve,
    Interpolation,
    competition_metric,
    froc_curve,
    make_table,
    sensitivity_at,
    sensitivity_draws,
)
from medvision.evaluation.matching import match_boxes, match_centers
from medvision.evaluation.results import (
    ClassResult,
    Estimate,
    Evaluation,
    FalsePositiveResult,
    Froc,
    OperatingPoint,
    Settings,
)

IOU_THRESHOLDS = (0.1, 0.5)
"""3-D IoU for AP: 0.1 is usual for small lesions (nnDetection), 0.5 asks for a tight box."""

BAND_RATES = tuple(np.geomspace(1 / 16, 16, 49).tolist())
"""False positives per scan at which the confidence band of a curve is drawn."""

FEW_LESIONS = 10
"""Below this many lesions a class gets a warning: one lesion more moves it by 0.1 or more."""


def evaluate(
    cases: Iterable[CaseResult],
    *,
    class_names: Sequence[str],
    operating_fp: float = 1.0,
    draws: int = 1000,
    seed: int = 0,
    interpolation: Interpolation = "linear",
) -> Evaluation:
    """Score scans against their reference; the order of ``cases`` does not matter.

    ``class_names`` gives the order of the tables; classes that only the reference has are added.
    ``operating_fp`` is the number of false positives per scan allowed at the operating point,
    ``draws`` the number of bootstrap samples (0: no intervals). No lesions, no findings and healthy
    scans alone are fine: what is not defined is None. Raises InputError without scans or for a
    case_id that comes twice, UsageError for a negative ``operating_fp`` or ``draws``.

    >>> import numpy as np
    >>> healthy = CaseResult("scan-1", (), (), np.eye(4), (8, 64, 64))
    >>> evaluate([healthy], class_names=["solid"]).operating.fp_per_scan
    0.0
    """
    ordered = _checked(cases, operating_fp, draws)
    names = _all_classes(ordered, class_names)
    groups = [f"p {case.patient}" if case.patient else f"c {case.case_id}" for case in ordered]
    matched = breakdown.match_all(ordered, draw_weights(groups, draws, seed))
    point = operating_point(matched, operating_fp)
    lesions = breakdown.lesion_results(matched, point)
    false = breakdown.false_positive_results(matched, point)
    overall = _class_result(matched, None, point, false, interpolation)
    classes = tuple(_class_result(matched, name, point, false, interpolation) for name in names)
    mean_ap, mean_ap_classes = _mean_ap(classes)
    return Evaluation(
        scans=len(ordered),
        healthy_scans=sum(case.healthy for case in ordered),
        lesions=len(lesions),
        ignored=sum(len(case.ignored) for case in ordered),
        findings=sum(len(case.findings) for case in ordered),
        class_names=names,
        overall=overall,
        classes=classes,
        sizes=breakdown.size_results(matched, point, lesions),
        confusion=breakdown.confusion(matched, lesions, names),
        operating=point,
        operating_points=tuple(operating_point(matched, rate) for rate in FROC_RATES),
        mean_ap=mean_ap,
        mean_ap_classes=mean_ap_classes,
        lesion_results=lesions,
        false_positive_results=false,
        settings=Settings("center", IOU_THRESHOLDS, interpolation, draws, seed, 0.95),
        warnings=_warnings(matched, classes),
    )


def _checked(
    cases: Iterable[CaseResult], operating_fp: float, draws: int
) -> tuple[CaseResult, ...]:
    ordered = tuple(sorted(cases, key=lambda case: case.case_id))
    names = [case.case_id for case in ordered]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if not ordered:
        raise InputError("An evaluation needs one scan with a reference or more; got none.")
    if repeated:
        raise InputError(f"Every scan may come once; {', '.join(repeated[:5])} came again.")
    if not (operating_fp >= 0 and draws >= 0):
        raise UsageError(
            "Operating false positives per scan and draws must be 0 or more; "
            f"got {operating_fp} and {draws}."
        )
    return ordered


def _all_classes(cases: Sequence[CaseResult], class_names: Sequence[str]) -> tuple[str, ...]:
    seen = sorted({lesion.class_name for case in cases for lesion in case.lesions})
    return tuple(dict.fromkeys([*class_names, *seen]))


def _class_result(
    matched: Matched,
    name: str | None,
    point: OperatingPoint,
    false: Sequence[FalsePositiveResult],
    interpolation: Interpolation,
) -> ClassResult:
    chosen = np.array([name in (None, item.class_name) for item in matched.lesions], dtype=bool)
    table = matched.table.select_lesions(chosen)
    own = table
    if name is not None:
        own = make_table([match_centers(case, name) for case in matched.cases])
    detected, lesions = int((table.lesion_score >= threshold_of(point)).sum()), int(chosen.sum())
    named = sum(name in (None, item.class_name) for item in false)
    target = point.target_fp_per_scan
    any_class = _froc(table, matched.weights, interpolation)
    return ClassResult(
        name="all" if name is None else name,
        scans=len(np.unique(table.lesion_case)),
        lesions=lesions,
        detected=detected,
        missed=lesions - detected,
        false_positives=named,
        fp_per_scan=named / len(matched.cases),
        sensitivity=estimate(
            detected / lesions if lesions else None,
            sensitivity_draws(table, matched.weights, target, "step")[:, 0],
            matched.weights,
            table.lesion_case,
        ),
        any_class=any_class,
        class_wise=_froc(own, matched.weights, interpolation) if name else any_class,
        ap={f"{iou:g}": _ap(matched, iou, name) for iou in IOU_THRESHOLDS},
    )


def _froc(table: DetectionTable, weights: NDArray[np.int64], interpolation: Interpolation) -> Froc:
    curve = froc_curve(table)
    rates = (*FROC_RATES, *BAND_RATES)
    draws = sensitivity_draws(table, weights, rates, interpolation)
    values = sensitivity_at(curve, FROC_RATES, interpolation)
    count = len(FROC_RATES)
    sensitivity = tuple(
        estimate(float(value), draws[:, column], weights, table.lesion_case)
        for column, value in enumerate(values)
    )
    cpm = estimate(
        competition_metric(curve, interpolation),
        draws[:, :count].mean(axis=1),
        weights,
        table.lesion_case,
    )
    band = [percentile_interval(values) for values in draws[:, count:].T]
    known = [item for item in band if item is not None] if cpm.low is not None else []
    corners = _corners(curve)
    return Froc(
        rates=FROC_RATES,
        sensitivity=sensitivity,
        cpm=cpm,
        curve_fp_per_scan=tuple(curve.fp_per_scan[corners].tolist()),
        curve_sensitivity=tuple(curve.sensitivity[corners].tolist()),
        band_rates=BAND_RATES if known else (),
        band_low=tuple(low for low, _ in known),
        band_high=tuple(high for _, high in known),
    )


def _corners(curve: FrocCurve) -> NDArray[np.bool_]:
    """Mark the points without which the drawn curve would change; none if it is undefined."""
    if np.isnan(curve.sensitivity[0]):
        return np.zeros(len(curve.sensitivity), dtype=bool)
    change = np.diff(curve.sensitivity) != 0
    return np.append(change, True) | np.append(True, change)


def _ap(matched: Matched, iou: float, name: str | None) -> Estimate:
    table = rank_findings([match_boxes(case, iou, name) for case in matched.cases])
    return estimate(
        average_precision(table),
        precision_draws(table, matched.weights),
        matched.weights,
        table.lesion_case,
    )


def _mean_ap(classes: Sequence[ClassResult]) -> tuple[dict[str, float | None], int]:
    means: dict[str, float | None] = {}
    for iou in (f"{value:g}" for value in IOU_THRESHOLDS):
        values = [item.ap[iou].value for item in classes]
        known = [value for value in values if value is not None]
        means[iou] = sum(known) / len(known) if known else None
    return means, sum(item.lesions > 0 for item in classes)


def _warnings(matched: Matched, classes: Sequence[ClassResult]) -> tuple[str, ...]:
    sentences = []
    if len(matched.cases) == 1:
        return ("A single scan: it says nothing about rates, and there are no intervals.",)
    if not matched.lesions:
        sentences.append("No reference lesions: only false positives can be counted.")
    few = [item for item in classes if 0 < item.lesions < FEW_LESIONS]
    if few:
        listed = ", ".join(f"{item.name} ({item.lesions})" for item in few)
        sentences.append(
            f"Fewer than {FEW_LESIONS} lesions: {listed}. Figures for so few can change much "
            "with one lesion more."
        )
    empty = [item.name for item in classes if item.lesions == 0]
    if empty and matched.lesions:
        sentences.append(
            f"No reference lesion of class {', '.join(empty)}: n/a there, and left out of means."
        )
    if len(np.unique(matched.table.lesion_case)) == 1:
        sentences.append(
            "All lesions are in one scan: no confidence interval can be had from resampling scans."
        )
    return tuple(sentences)
