"""ATSS: an example by hand, and plain loops over Python numbers on random boxes and levels."""

from __future__ import annotations

import math
from collections import Counter
from statistics import fmean, pstdev

import pytest
import torch
from torch import Tensor

from medvision.models.config import RetinaNetConfig
from medvision.models.matcher import BACKGROUND, by_atss, match_atss
from medvision.models.two_stage_config import ProposalConfig

Box = list[float]

LESION = [0.0, 0.0, 20.0, 20.0]
BEST, SECOND, OUTSIDE, SMALL = range(4)
NEAR = [
    [0.0, 0.0, 20.0, 10.0],  # BEST: 200 of 400 pixels, IoU 0.5; its centre is 5 from the lesion's
    [0.0, 12.8, 20.0, 20.0],  # SECOND: 144 of 400, 0.36; 6.4 away
    [0.0, 0.0, 45.0, 20.0],  # OUTSIDE: 400 of 900, 0.444; 12.5 away, its centre out of the lesion
    [5.0, 5.0, 15.0, 15.0],  # SMALL: 100 of 400, 0.25; at the lesion's centre
    [21.0, 9.0, 23.0, 11.0],  # the other five meet nothing and are 12 or 12.3 away
    [-3.0, 9.0, -1.0, 11.0],
    [9.0, 21.0, 11.0, 23.0],
    [9.0, -3.0, 11.0, -1.0],
    [21.3, 9.0, 23.3, 11.0],
]
"""The nine anchors of the first level that are nearest to the lesion."""

FAR = [[70.0 + step, 70.0, 72.0 + step, 72.0] for step in range(16)]
"""Sixteen more of that level, which would lower the threshold were they looked at."""

COARSE = [[60.0, 60.0, 68.0, 68.0]]
"""The second level: it is looked at, though all of the first level are nearer."""


def test_by_hand_the_threshold_is_mean_plus_deviation_of_nine_candidates_a_level() -> None:
    overlaps = [0.5, 0.36, 400 / 900, 0.25, 0, 0, 0, 0, 0, 0]
    mean, deviation = fmean(overlaps), pstdev(overlaps)
    assert mean == pytest.approx(1.554444 / 10, abs=1e-6)
    # The squares are 0.25, 0.1296, 0.197531 and 0.0625: 0.639631 / 10 - 0.155444^2 = 0.039800.
    assert deviation == pytest.approx(math.sqrt(0.039800), abs=1e-5)
    threshold = mean + deviation
    assert threshold == pytest.approx(0.35494, abs=1e-4)
    assert mean < overlaps[SMALL] < threshold < overlaps[SECOND] < mean + 2 * deviation
    # Divided by nine, as by the authors, the deviation would leave the second out, too.
    assert overlaps[SECOND] < mean + deviation * math.sqrt(10 / 9)
    matched = match_atss(
        [torch.tensor(NEAR + FAR), torch.tensor(COARSE)], torch.tensor([LESION]), 9
    )
    assert torch.where(matched == 0)[0].tolist() == [BEST, SECOND]
    assert (matched[[*range(2, len(matched))]] == BACKGROUND).all()


def iou(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return shared / (sum(areas) - shared)


def center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def candidates_of(levels: list[list[Box]], box: Box, count: int) -> list[int]:
    found, first = [], 0
    for level in levels:
        near = sorted(range(len(level)), key=lambda i: math.dist(center(level[i]), center(box)))
        found += [first + index for index in near[:count]]
        first += len(level)
    return found


def plain_atss(levels: list[list[Box]], boxes: list[Box], count: int) -> tuple[list[int], int]:
    """Return each anchor's box, and how many boxes had to be served after the others."""
    anchors = [anchor for level in levels for anchor in level]
    candidates = [candidates_of(levels, box, count) for box in boxes]
    claims: dict[int, list[tuple[float, int]]] = {}
    for number, box in enumerate(boxes):
        overlap = {index: iou(anchors[index], box) for index in candidates[number]}
        threshold = fmean(overlap.values()) + pstdev(overlap.values())
        best = max(overlap, key=lambda index: overlap[index])
        for index, value in overlap.items():
            x, y = center(anchors[index])
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            if index == best or (inside and value >= threshold and value > 0):
                claims.setdefault(index, []).append((-value, number))
    matched = [min(claims[i])[1] if i in claims else BACKGROUND for i in range(len(anchors))]
    served = 0
    for number, box in enumerate(boxes):
        if number in matched:
            continue
        served += 1
        for index in sorted(candidates[number], key=lambda i: -iou(anchors[i], box)):
            owner = matched[index]
            if owner == BACKGROUND or Counter(matched)[owner] > 1:
                matched[index] = number
                break
    return matched, served


def random_boxes(count: int, smallest: float, largest: float, generator: torch.Generator) -> Tensor:
    """Return boxes whose centres and sides are spread evenly over 0..64 and the sizes given."""
    sides = smallest + torch.rand(count, 2, generator=generator) * (largest - smallest)
    middle = torch.rand(count, 2, generator=generator) * 64
    return torch.cat((middle - sides / 2, middle + sides / 2), dim=1)


def test_random_boxes_are_matched_as_by_plain_loops() -> None:
    positives, several, served = 0, 0, 0
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        sizes = [(4, 8, 90), (7, 15, 40), (14, 32, 25), (30, 60, 6)][: 1 + seed % 4]
        levels = [random_boxes(n, low, high, generator) for low, high, n in sizes]
        boxes = random_boxes(1 + seed % 7, 4, 30, generator)
        if seed % 3 == 0:  # lesions close to another want the same anchors
            # Neither is the other moved: equal overlaps would be equal but for their rounding.
            wider = torch.tensor([-0.3, -0.5, 0.4, 0.2])
            boxes = torch.cat((boxes, boxes[:2] + wider, boxes[:1] - wider))
        expected, late = plain_atss([level.tolist() for level in levels], boxes.tolist(), 9)
        found = match_atss(levels, boxes, 9)
        assert found.tolist() == expected, f"seed {seed}"
        counts = Counter(expected)
        positives += len(boxes)
        several += sum(counts[number] > 1 for number in range(len(boxes)))
        served += late
    # Each rule had its part: more than one anchor a lesion, and lesions that others left without one.
    assert several > positives / 3
    assert served > 10


@pytest.mark.parametrize("count", [1, 4, 9, 30])
def test_as_many_candidates_a_level_as_the_settings_say(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    levels = [random_boxes(n, 5, 25, generator) for n in (60, 20, 8)]
    config = RetinaNetConfig(atss_candidates=count)
    for _ in range(20):
        boxes = random_boxes(3, 6, 30, generator)
        expected, _ = plain_atss([level.tolist() for level in levels], boxes.tolist(), count)
        assert by_atss(levels, boxes, config).tolist() == expected


def test_the_settings_ask_for_nine() -> None:
    assert RetinaNetConfig().atss_candidates == ProposalConfig().atss_candidates == 9
