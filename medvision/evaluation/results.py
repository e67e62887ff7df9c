"""The records that an evaluation is made of; None stands for "not applicable" everywhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % confidence interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Froc:
    """A FROC curve: read at the usual rates, and as points to draw.

    ``sensitivity[i]`` belongs to ``rates[i]`` false positives per scan. The ``curve_*`` tuples are
    the corners of the curve, the ``band_*`` tuples its confidence band at ``band_rates``.
    """

    rates: tuple[float, ...]
    sensitivity: tuple[Estimate, ...]
    cpm: Estimate
    curve_fp_per_scan: tuple[float, ...]
    curve_sensitivity: tuple[float, ...]
    band_rates: tuple[float, ...]
    band_low: tuple[float, ...]
    band_high: tuple[float, ...]


@dataclass(frozen=True)
class ClassResult:
    """How one class did, or all lesions together (``name`` "all").

    ``detected``, ``missed`` and ``sensitivity`` are at the operating point and count a lesion
    that any finding hits, whatever class it is given. ``false_positives`` there are those named
    so. ``any_class``: lesions of this class, findings and false positives of every class.
    ``class_wise``: only findings named so, by their class score; one on a lesion of another class
    is a false positive. ``ap`` is class-wise too, by IoU threshold ("0.1"); of "all" it asks for
    no
    class at all.
    """

    name: str
    scans: int
    lesions: int
    detected: int
    missed: int
    false_positives: int
    fp_per_scan: float
    sensitivity: Estimate
    any_class: Froc
    class_wise: Froc
    ap: dict[str, Estimate]


@dataclass(frozen=True)
class SizeResult:
    """Lesions with ``low_mm <= longest in-plane diameter < high_mm`` at the operating point."""

    low_mm: float
    high_mm: float | None
    lesions: int
    detected: int
    sensitivity: Estimate


@dataclass(frozen=True)
class Confusion:
    """Reference class (rows) against predicted class (columns) of the lesions found.

    ``accuracy`` is the share named rightly; ``majority_accuracy`` what always answering
    ``majority_class``, the most frequent one among these lesions, would reach.
    """

    reference_classes: tuple[str, ...]
    predicted_classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    accuracy: Estimate
    majority_class: str | None
    majority_accuracy: float | None


@dataclass(frozen=True)
class OperatingPoint:
    """What keeping every finding scored ``threshold`` or higher gives.

    ``threshold`` None: no finding is kept. ``target_fp_per_scan`` is the most that was allowed,
    ``fp_per_scan`` what came. ``sensitivity`` is detected / lesions, ``ppv`` the share of
    findings that are hits, among hits and false positives. The interval of ``sensitivity`` lets
    the threshold follow the false positives in every draw.
    """

    target_fp_per_scan: float
    threshold: float | None
    findings: int
    detected: int
    missed: int
    false_positives: int
    fp_per_scan: float
    fp_per_healthy_scan: float | None
    fp_per_diseased_scan: float | None
    sensitivity: Estimate
    ppv: float | None


@dataclass(frozen=True)
class LesionResult:
    """One reference lesion at the operating point.

    ``finding_id`` and ``score`` are of the best finding that hits it, above the threshold or not;
    both None if nothing does. Then the ``nearest_*`` are of the finding whose centre is closest.
    """

    case_id: str
    label: int
    class_name: str
    diameter_mm: float
    detected: bool
    finding_id: int | None
    score: float | None
    predicted_class: str | None
    nearest_finding_id: int | None
    nearest_score: float | None
    nearest_mm: float | None


@dataclass(frozen=True)
class FalsePositiveResult:
    """One false positive at the operating point; ``healthy``: in a scan without a lesion."""

    case_id: str
    finding_id: int
    class_name: str
    score: float
    diameter_mm: float
    healthy: bool


@dataclass(frozen=True)
class Settings:
    """How the figures were computed."""

    hit_rule: str
    iou_thresholds: tuple[float, ...]
    interpolation: str
    draws: int
    seed: int
    interval_level: float


@dataclass(frozen=True)
class Evaluation:
    """The scores of a set of scans.

    ``findings`` counts all findings, whatever their score. ``operating`` is the operating point
    of every count; ``operating_points`` those at the usual rates. ``mean_ap`` averages the
    classes that have one, ``mean_ap_classes`` says how many. ``warnings`` are sentences for the
    reader.
    """

    scans: int
    healthy_scans: int
    lesions: int
    ignored: int
    findings: int
    class_names: tuple[str, ...]
    overall: ClassResult
    classes: tuple[ClassResult, ...]
    sizes: tuple[SizeResult, ...]
    confusion: Confusion
    operating: OperatingPoint
    operating_points: tuple[OperatingPoint, ...]
    mean_ap: dict[str, float | None]
    mean_ap_classes: int
    lesion_results: tuple[LesionResult, ...]
    false_positive_results: tuple[FalsePositiveResult, ...]
    settings: Settings
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers for JSON; there is no NaN and no infinity in it."""
        return asdict(self)
