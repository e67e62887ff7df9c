"""How good the network is on the held-out scans: findings against reference, lesion by lesion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from medvision.detector import DetectorConfig
from medvision.device import Device
from medvision.evaluation.case import CaseResult
from medvision.evaluation.froc import (
    competition_metric,
    froc_curve,
    make_table,
    operating_threshold,
    sensitivity_at,
)
from medvision.evaluation.matching import match_centers
from medvision.models.faster_rcnn import FasterRCNN
from medvision.models.proposals import ProposalRecall
from medvision.predict import find_lesions
from medvision.progress import Progress, ProgressCallback
from medvision.training.cache import CachedCase
from medvision.training.recall import measure_proposals


@dataclass(frozen=True)
class Validation:
    """FROC figures over all classes; None where the held-out scans have no lesion.

    ``score_thresh`` is the lowest score that lets ``operating_fp_per_scan`` through; None if even the best
    finding is a false positive too many. ``proposals`` counts the lesions' boxes that a two-stage model
    proposes, by class and for "all"; empty for other models.
    """

    scans: int
    lesions: int
    cpm: float | None
    sensitivity_at_1_fp: float | None
    score_thresh: float | None
    proposals: dict[str, ProposalRecall]
    results: tuple[CaseResult, ...]


def validate(
    network: nn.Module,
    config: DetectorConfig,
    cases: list[CachedCase],
    device: Device,
    on_progress: ProgressCallback,
    *,
    as_predicted: bool = False,
) -> Validation:
    """Find lesions in every held-out scan and match them to the reference by the LUNA16 rule.

    Unless ``as_predicted``, each slice is looked at once, without mirror images and other scales: they cost
    six times as much and change little in the comparison of one network with another. They do lower
    the scores.
    """
    if not as_predicted:
        config = config.model_copy(update={"predict": config.predict.plain()})
    results = []
    for number, case in enumerate(cases, start=1):
        volume = case.volume
        findings = find_lesions(volume, network, config, device)
        results.append(
            CaseResult(case.case_id, findings, case.annotations(), volume.affine, volume.shape)
        )
        on_progress(Progress("validate", number, len(cases), "scans"))
    table = make_table([match_centers(result) for result in results])
    curve = froc_curve(table)
    thresh = operating_threshold(table, config.predict.operating_fp_per_scan)
    return Validation(
        scans=len(cases),
        lesions=sum(len(result.lesions) for result in results),
        cpm=_finite(competition_metric(curve)),
        sensitivity_at_1_fp=_finite(float(sensitivity_at(curve, [1.0])[0])),
        score_thresh=_finite(thresh),
        proposals=_proposals(network, config, cases, device),
        results=tuple(results),
    )


def _proposals(
    network: nn.Module, config: DetectorConfig, cases: list[CachedCase], device: Device
) -> dict[str, ProposalRecall]:
    if not isinstance(network, FasterRCNN):
        return {}
    return measure_proposals(network, config, cases, device)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
