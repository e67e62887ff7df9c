"""A few pictures of the held-out lesions: what the network found and what it missed."""

from __future__ import annotations

from pathlib import Path

from medvision.evaluation.case import CaseResult, longest_diameter_mm
from medvision.evaluation.matching import match_centers
from medvision.files import atomic_write_bytes
from medvision.report.pictures import Marks, draw
from medvision.training.cache import CachedCase

MOST_PICTURES = 12


def write_validation_pictures(
    folder: Path,
    cases: list[CachedCase],
    results: tuple[CaseResult, ...],
    score_thresh: float,
) -> list[Path]:
    """Draw up to 12 lesions of the held-out scans, the worst found first; return the files.

    The reference is outlined, findings are boxed, those that score under ``score_thresh`` dashed.
    A file is named by its rank, case and score of the best finding on the lesion,
    ``01_case_0.03.png``, or ``missed`` in place of the score.
    """
    if folder.is_dir():
        for old in folder.glob("*.png"):
            old.unlink()
    by_id = {case.case_id: case for case in cases}
    ranked = sorted(_scored_lesions(results), key=lambda item: item[0])
    paths = []
    for rank, (score, result, number) in enumerate(ranked[:MOST_PICTURES], start=1):
        lesion = result.lesions[number]
        size = longest_diameter_mm(lesion, result.affine)
        marks = Marks(
            result.annotations,
            [item for item in result.findings if item.score >= score_thresh],
            [item for item in result.findings if item.score < score_thresh],
        )
        picture = draw(by_id[result.case_id].volume, lesion.box.center_index, size, marks)
        named = "missed" if score < 0 else f"{score:.2f}"
        path = folder / f"{rank:02d}_{result.case_id}_{named}.png"
        atomic_write_bytes(path, picture.png)
        paths.append(path)
    return paths


def _scored_lesions(results: tuple[CaseResult, ...]) -> list[tuple[float, CaseResult, int]]:
    """Return (score of the best finding or -1, case, lesion number) for every lesion."""
    scored = []
    for result in results:
        for number, score in enumerate(match_centers(result).lesion_scores):
            found = float(score) if 0 <= score <= 1 else -1.0
            scored.append((found, result, number))
    return scored
