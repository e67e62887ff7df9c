"""The report's figures and sentences as text."""

from __future__ import annotations

from collections.abc import Sequence

from medvision.evaluation.results import Estimate, Evaluation, LesionResult

NOT_APPLICABLE = "n/a"


def number(value: float | None, decimals: int = 2) -> str:
    """Write a number with so many decimals, or n/a."""
    return NOT_APPLICABLE if value is None else f"{value:.{decimals}f}"


def score_text(score: float | None) -> str:
    """Write a score with two decimals, with more where it would read as 0 or as 1."""
    if score is None:
        return NOT_APPLICABLE
    text = f"{score:.2f}"
    if text in ("0.00", "1.00") and score not in (0.0, 1.0):
        return f"{score:.4f}" if 0.00005 <= score < 0.99995 else f"{score:.2g}"
    return text


def rate_text(rate: float) -> str:
    """Write a number of false positives per scan as short as it goes: 1/8, 1/2, 1, 0.97."""
    fractions = {0.125: "1/8", 0.25: "1/4", 0.5: "1/2"}
    return fractions.get(rate, f"{rate:g}")


def limit_text(rate: float) -> str:
    """Write "1 false positive", "1/8 false positives"."""
    return f"{rate_text(rate)} false positive{'' if rate == 1 else 's'}"


def mean_text(value: float) -> str:
    """Write a mean with two decimals, with one if the second is 0: 0.97, 1.0."""
    text = f"{value:.2f}"
    return text.removesuffix("0")


def interval_text(estimate: Estimate) -> str:
    """Write the interval as "0.71 to 0.91"; empty where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.2f} to {estimate.high:.2f}"


def counted(count: int, noun: str) -> str:
    """Write "1 lesion", "2 lesions"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def size_text(low_mm: float, high_mm: float | None) -> str:
    """Write a size bin as a reader would: "below 6 mm", "6 to below 8 mm", "15 mm and more"."""
    if high_mm is None:
        return f"{low_mm:g} mm and more"
    return f"below {high_mm:g} mm" if low_mm == 0 else f"{low_mm:g} to below {high_mm:g} mm"


def closest_text(lesion: LesionResult) -> str:
    """Say what came closest to a lesion that was missed."""
    if lesion.score is not None:
        best = f"finding no. {lesion.finding_id}, score {score_text(lesion.score)}"
        return f"closest: {best}, below the threshold"
    if lesion.nearest_finding_id is None:
        return "no finding in this scan"
    return (
        f"no finding hits it; nearest: no. {lesion.nearest_finding_id}, "
        f"{number(lesion.nearest_mm, 0)} mm away, score {score_text(lesion.nearest_score)}"
    )


def headline(evaluation: Evaluation) -> str:
    """Say in one sentence what came out."""
    if not evaluation.lesions:
        return _headline_without_lesions(evaluation)
    if evaluation.scans == 1:
        return _headline_of_one_scan(evaluation)
    point = evaluation.operating
    share = number(point.sensitivity.value)
    interval = interval_text(point.sensitivity)
    bracket = f"{share}, 95 % CI {interval}" if interval else share
    noun = "lesion" if evaluation.lesions == 1 else "lesions"
    return (
        f"Found {point.detected} of {evaluation.lesions} {noun} at "
        f"{mean_text(point.fp_per_scan)} false positives "
        f"per scan ({bracket})"
    )


def lead(evaluation: Evaluation) -> str:
    """Say what the headline rests on, and what was missed."""
    point = evaluation.operating
    parts = []
    if evaluation.lesions:
        missed = evaluation.lesions - point.detected
        if missed and evaluation.scans == 1:
            parts += [
                _missed_sentence(item) for item in evaluation.lesion_results if not item.detected
            ]
        elif missed:
            verb = "was" if missed == 1 else "were"
            parts.append(f"{counted(missed, 'lesion')} {verb} missed.")
        else:
            parts.append("No lesion was missed.")
    elif point.false_positives:
        parts.append(
            "There is nothing to find in the reference, so sensitivity is not defined and every "
            "finding counted is a false positive."
        )
    parts.append(_threshold_sentence(evaluation))
    return " ".join(parts)


def _headline_without_lesions(evaluation: Evaluation) -> str:
    point = evaluation.operating
    place = "this scan" if evaluation.scans == 1 else f"{evaluation.scans} scans"
    false = counted(point.false_positives, "false positive")
    rate = "" if evaluation.scans == 1 else f" ({mean_text(point.fp_per_scan)} per scan)"
    return f"No reference lesions in {place}: {false}{rate}"


def _headline_of_one_scan(evaluation: Evaluation) -> str:
    point = evaluation.operating
    found = [item for item in evaluation.lesion_results if item.detected]
    false = counted(point.false_positives, "false positive")
    if not found and evaluation.lesions == 1:
        return f"The lesion was missed: 0 of 1 found, with {false}"
    if not found:
        return f"All lesions were missed: 0 of {evaluation.lesions} found, with {false}"
    return f"{len(found)} of {evaluation.lesions} found, {_ranks(found)}, with {false}"


def _ranks(found: Sequence[LesionResult]) -> str:
    if len(found) == 1:
        return f"as finding no. {found[0].finding_id} (score {score_text(found[0].score)})"
    numbers = sorted({item.finding_id for item in found if item.finding_id is not None})
    listed = ", ".join(str(value) for value in numbers[:-1])
    return f"as findings no. {listed} and {numbers[-1]}" if listed else f"as no. {numbers[-1]}"


def _missed_sentence(lesion: LesionResult) -> str:
    size = f"{lesion.class_name}, {number(lesion.diameter_mm, 1)} mm"
    return f"Lesion {lesion.label} ({size}) was missed; {closest_text(lesion)}."


def _threshold_sentence(evaluation: Evaluation) -> str:
    point = evaluation.operating
    limit = limit_text(point.target_fp_per_scan)
    if point.threshold is None:
        if not evaluation.findings:
            return "There is no finding at all."
        return f"No finding is counted: the best-scored one alone would pass {limit} per scan."
    noun = "scan" if evaluation.scans == 1 else "scan on average"
    return (
        f"Counted are findings scored {score_text(point.threshold)} or higher, the lowest "
        f"threshold with at most {limit} per {noun}."
    )
