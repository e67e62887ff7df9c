"""The lesions missed, the worst false positives and some hits, each with a picture."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from medvision.evaluation.case import CaseResult, center_mm
from medvision.evaluation.results import Evaluation, FalsePositiveResult, LesionResult
from medvision.findings.finding import Finding
from medvision.geometry import patient_to_index
from medvision.labels.annotation import Annotation
from medvision.report.load import ImageReader
from medvision.report.pictures import Marks, Picture, draw
from medvision.report.words import closest_text, number, score_text
from medvision.scans.volume import Volume

FALSE_POSITIVES = 12
HITS = 6

MAX_PICTURES = 200
"""Pictures in one page, about 0.1 MB each; every miss beyond still gets its caption."""


@dataclass(frozen=True)
class Item:
    """One entry: where to look, what to draw, and the words; ``png`` is base64, "" without."""

    case_id: str
    center: tuple[float, float, float]
    size_mm: float
    marks: Marks
    title: str
    caption: str
    alt: str = ""
    note: str = ""
    png: str = ""


@dataclass(frozen=True)
class Gallery:
    """The three parts of the gallery; ``without_picture`` counts the entries that have none."""

    missed: tuple[Item, ...]
    false_positives: tuple[Item, ...]
    hits: tuple[Item, ...]
    without_picture: int


def make_gallery(
    evaluation: Evaluation, cases: Sequence[CaseResult], images: ImageReader | None
) -> Gallery:
    """Draw every miss, the FALSE_POSITIVES best-scored false positives and HITS hits.

    The hits are spread evenly over their scores. Each scan is read once. An entry whose scan is
    missing or lies in another grid than its findings has no picture.
    """
    by_id = {case.case_id: case for case in cases}
    threshold = evaluation.operating.threshold
    lesions = evaluation.lesion_results
    missed = [
        _lesion_item(by_id[one.case_id], one, threshold) for one in lesions if not one.detected
    ]
    false = [
        _false_item(by_id[one.case_id], one, threshold)
        for one in evaluation.false_positive_results[:FALSE_POSITIVES]
    ]
    found = sorted((one for one in lesions if one.detected), key=lambda one: -(one.score or 0))
    chosen = np.unique(np.linspace(0, max(len(found) - 1, 0), HITS).round().astype(int))
    hits = [_lesion_item(by_id[found[i].case_id], found[i], threshold) for i in chosen if found]
    drawn = _draw_all([*false, *hits, *missed], by_id, images)
    first, second = len(false), len(false) + len(hits)
    return Gallery(
        missed=tuple(drawn[second:]),
        false_positives=tuple(drawn[:first]),
        hits=tuple(drawn[first:second]),
        without_picture=sum(not item.png for item in drawn),
    )


def _lesion_item(case: CaseResult, lesion: LesionResult, threshold: float | None) -> Item:
    annotation = next(item for item in case.lesions if item.label == lesion.label)
    center = patient_to_index(case.affine, center_mm(annotation, case.affine))
    center[0] = _widest_slice(annotation)
    wanted = lesion.finding_id if lesion.finding_id is not None else lesion.nearest_finding_id
    weak = [] if lesion.detected else [item for item in case.findings if item.finding_id == wanted]
    marks = Marks(case.annotations, _kept(case, threshold), _below(weak, threshold))
    size = f"{lesion.class_name}, {number(lesion.diameter_mm, 1)} mm"
    what = closest_text(lesion)
    if lesion.detected:
        what = (
            f"found as finding no. {lesion.finding_id}, score {score_text(lesion.score)}, "
            f"named {lesion.predicted_class}"
        )
    title = f"{case.case_id}, lesion {lesion.label}"
    return Item(case.case_id, _triple(center), lesion.diameter_mm, marks, title, f"{size}; {what}")


def _false_item(case: CaseResult, one: FalsePositiveResult, threshold: float | None) -> Item:
    finding = next(item for item in case.findings if item.finding_id == one.finding_id)
    center = finding.box.center_index
    center[0] = finding.key_slice
    caption = (
        f"named {one.class_name}, score {score_text(one.score)}, "
        f"{number(one.diameter_mm, 1)} mm; {'healthy scan' if one.healthy else 'scan with lesions'}"
    )
    marks = Marks(case.annotations, _kept(case, threshold))
    title = f"{case.case_id}, finding no. {one.finding_id}"
    return Item(case.case_id, _triple(center), one.diameter_mm, marks, title, caption)


def _draw_all(
    items: Sequence[Item], cases: dict[str, CaseResult], images: ImageReader | None
) -> list[Item]:
    drawn = list(items)
    if images is None:
        return drawn
    places: dict[str, list[int]] = {}
    for place, item in enumerate(items[:MAX_PICTURES]):
        places.setdefault(item.case_id, []).append(place)
    for case_id, numbers in places.items():
        volume = images(case_id)
        if volume is None or not _same_scan(volume, cases[case_id]):
            continue
        for place in numbers:
            picture = draw(volume, items[place].center, items[place].size_mm, items[place].marks)
            drawn[place] = _with_picture(items[place], picture)
    return drawn


def _same_scan(volume: Volume, case: CaseResult) -> bool:
    from medvision.geometry import same_grid

    return volume.shape == case.shape and same_grid(volume.affine, case.affine, case.shape)


def _with_picture(item: Item, picture: Picture) -> Item:
    slices = ", ".join(str(index + 1) for index in picture.slices)
    many = "Slices" if len(picture.slices) > 1 else "Slice"
    note = f"{many} {slices}; {picture.window}; {picture.directions}."
    return replace(
        item,
        png=base64.b64encode(picture.png).decode("ascii"),
        note=note,
        alt=f"{item.title}: {item.caption}. {many} {slices} of the scan.",
    )


def _kept(case: CaseResult, threshold: float | None) -> tuple[Finding, ...]:
    if threshold is None:
        return ()
    return tuple(item for item in case.findings if item.score >= threshold)


def _below(findings: Sequence[Finding], threshold: float | None) -> tuple[Finding, ...]:
    return tuple(item for item in findings if threshold is None or item.score < threshold)


def _widest_slice(annotation: Annotation) -> float:
    if annotation.mask is None or not annotation.mask.any():
        return float(annotation.box.center_index[0])
    return float(annotation.box.slices[0].start + annotation.mask.sum(axis=(1, 2)).argmax())


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    first, second, third = values.tolist()
    return (first, second, third)
