"""Average precision: by hand, and against faster-coco-eval on boxes of one slice."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from medvision.evaluation.average_precision import (
    average_precision,
    precision_draws,
    rank_findings,
)
from medvision.evaluation.bootstrap import draw_weights
from medvision.evaluation.matching import ScanMatch, box_iou, match_overlaps


def match(outcomes: list[int], scores: list[float], lesions: int) -> ScanMatch:
    found_by = np.full(lesions, -1, dtype=np.int64)
    hits = np.flatnonzero(np.array(outcomes) == 1)
    found_by[: len(hits)] = hits
    return ScanMatch(np.array(scores, dtype=float), np.array(outcomes, dtype=np.int8), found_by)


def test_by_hand() -> None:
    # Hit, false, hit of three lesions: precision 1 up to recall 1/3, then 2/3 up to recall 2/3.
    table = rank_findings([match([1, 0], [0.9, 0.8], 2), match([1], [0.7], 1)])
    assert average_precision(table) == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)


def test_none_without_lesions_zero_without_findings_one_if_perfect() -> None:
    assert average_precision(rank_findings([match([0], [0.9], 0)])) is None
    assert average_precision(rank_findings([])) is None
    assert average_precision(rank_findings([match([], [], 2)])) == 0.0
    assert average_precision(rank_findings([match([1, 1], [0.9, 0.8], 2)])) == 1.0


def test_ignored_findings_do_not_count() -> None:
    table = rank_findings([match([3, 1, 2], [0.9, 0.8, 0.1], 1)])
    assert average_precision(table) == 1.0


def test_draws_equal_a_table_with_the_scans_copied() -> None:
    matches = [
        match([1, 0], [0.9, 0.8], 2),
        match([0, 1], [0.85, 0.7], 1),
        match([0], [0.6], 0),
        match([0, 0, 1], [0.95, 0.5, 0.4], 2),
    ]
    weights = draw_weights(["a", "b", "c", "d"], 30, seed=1)
    got = precision_draws(rank_findings(matches), weights)
    for value, weight in zip(got, weights, strict=True):
        copies = [matches[index] for index in np.repeat(np.arange(4), weight)]
        expected = average_precision(rank_findings(copies))
        assert value == pytest.approx(np.nan if expected is None else expected, nan_ok=True)


def random_images(seed: int, *, tied: bool) -> list[dict]:
    """Images with reference boxes, ignored regions and findings about them, some scores shared."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(12):
        count = int(generator.integers(0, 5))
        corner = generator.integers(0, 80, (count, 2))
        boxes = np.concatenate([corner, corner + generator.integers(8, 30, (count, 2))], axis=1)
        near = boxes[generator.integers(0, count, 6)] if count else np.zeros((0, 4))
        moved = near + generator.integers(-3, 4, near.shape)
        far = generator.integers(0, 80, (3, 2))
        found = np.concatenate([moved, np.concatenate([far, far + 12], axis=1)])
        scores = generator.random(len(found))
        images.append(
            {
                "boxes": boxes.astype(float),
                "crowd": generator.random(count) < 0.2,
                "found": found.astype(float),
                "scores": scores.round(1) if tied else scores,
            }
        )
    return images


def ours(images: list[dict], threshold: float) -> float | None:
    matches = []
    for image in images:
        boxes, found = (
            np.insert(np.insert(image[key], 2, 1, axis=1), 0, 0, axis=1)
            for key in ("boxes", "found")
        )
        lesions, ignored = boxes[~image["crowd"]], boxes[image["crowd"]]
        low = np.maximum(found[:, None, :3], ignored[None, :, :3])
        high = np.minimum(found[:, None, 3:], ignored[None, :, 3:])
        size = (found[:, 3:] - found[:, :3]).prod(axis=1)[:, None]
        covered = np.clip(high - low, 0, None).prod(axis=2) / size
        on_ignored = np.any(covered >= threshold, axis=1)
        overlaps = box_iou(found, lesions)
        matches.append(match_overlaps(image["scores"], overlaps, on_ignored, threshold))
    return average_precision(rank_findings(matches))


def theirs(images: list[dict], threshold: float) -> float:
    coco_eval = pytest.importorskip("faster_coco_eval")
    truth: dict = {"info": {}, "images": [], "annotations": [], "categories": [{"id": 1}]}
    results = []
    for number, image in enumerate(images, start=1):
        truth["images"].append({"id": number, "height": 120, "width": 120})
        for (y0, x0, y1, x1), crowd in zip(image["boxes"], image["crowd"], strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(crowd),
                }
            )
        for (y0, x0, y1, x1), score in zip(image["found"], image["scores"], strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            results.append(
                {"image_id": number, "category_id": 1, "bbox": box, "score": float(score)}
            )
    reference = coco_eval.COCO(copy.deepcopy(truth))
    judge = coco_eval.COCOeval_faster(reference, reference.loadRes(results), "bbox")
    judge.params.iouThrs = np.array([threshold])
    judge.evaluate()
    judge.accumulate()
    precision = judge.eval["precision"][0, :, 0, 0, -1]
    return float(precision.mean())


@pytest.mark.parametrize("threshold", [0.1, 0.5])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_coco(seed: int, tied: bool, threshold: float) -> None:
    images = random_images(seed, tied=tied)
    assert ours(images, threshold) == pytest.approx(theirs(images, threshold), abs=1e-9)
