"""Proposal recall on held-out scans, against lesions that are counted by hand."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import find_objects
from scipy.ndimage import label as components
from torch import Tensor, nn

from medvision.detector import DetectorConfig
from medvision.device import choose_device
from medvision.findings.config import PredictConfig
from medvision.geometry import make_affine
from medvision.models.faster_rcnn import FasterRCNN
from medvision.models.proposals import ProposalRecall
from medvision.models.two_stage_config import FasterRCNNConfig
from medvision.stacks.config import StackConfig
from medvision.training.cache import CachedCase
from medvision.training.recall import measure_proposals

Regions = namedtuple("Regions", "regions")
MODEL = FasterRCNNConfig(anchor_sizes=(((8.0, 8.0),) * 2,) * 3)
CONFIG = DetectorConfig(
    class_names=("ground_glass", "solid"),
    modality="CT",
    stack=StackConfig(n_slices=3, pixel_mm=0.7),
    model=MODEL,
    predict=PredictConfig(batch_size=2),
)


class BrightSpots(FasterRCNN):
    """Proposes what is brightest on the middle slice, moved by ``shift`` pixels along the columns."""

    def __init__(self, shift: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.config, self.shift, self.seen = MODEL, shift, 0

    def forward(self, images: Tensor, targets: Any = None) -> Any:
        self.seen += len(images)
        return Regions([self._spots(image[len(image) // 2]) for image in images])

    def _spots(self, image: Tensor) -> Tensor:
        spots = find_objects(components(image.numpy() > 0.9)[0])
        edges = [(x.start, y.start, x.stop, y.stop) for y, x in spots]
        moved = torch.tensor(edges, dtype=torch.float32).reshape(-1, 4)
        return moved + torch.tensor([self.shift, 0, self.shift, 0])


def case_of(ignored: frozenset[int] = frozenset()) -> CachedCase:
    """A body away from the corner, with a solid lesion on three slices and ground glass on one."""
    array = np.full((7, 90, 80), -1000, dtype=np.int16)
    array[:, 20:80, 30:76] = -100
    labels = np.zeros(array.shape, dtype=np.uint16)
    labels[2:5, 40:50, 50:60] = 1
    labels[4, 60:64, 36:44] = 2
    array[labels > 0] = 500
    affine = make_affine([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [2.5, 0.7, 0.7])
    classes = {1: "solid", 2: "ground_glass"}
    return CachedCase("one", "p", array, labels, affine, "CT", (-1000, 400), classes, ignored)


def measure(network: BrightSpots, *cases: CachedCase) -> dict[str, ProposalRecall]:
    device = choose_device("cpu", "float32")
    return measure_proposals(network, CONFIG, list(cases), device)


def test_every_box_that_is_proposed_where_it_is_counts() -> None:
    network = BrightSpots()
    assert measure(network, case_of()) == {
        "all": ProposalRecall(4, 4),
        "solid": ProposalRecall(3, 3),
        "ground_glass": ProposalRecall(1, 1),
    }
    assert network.seen == 3  # slices without a lesion are not looked at


@pytest.mark.parametrize(
    # Moved by s of w columns, two boxes share w - s of w + s: a half up to a third of w.
    ("shift", "solid", "ground_glass"),
    [(2.5, 3, 1), (3.0, 3, 0), (3.5, 0, 0)],
)
def test_a_box_counts_from_half_overlap_on(shift: float, solid: int, ground_glass: int) -> None:
    found = measure(BrightSpots(shift), case_of())
    assert (found["solid"].covered, found["ground_glass"].covered) == (solid, ground_glass)
    assert found["all"] == ProposalRecall(solid + ground_glass, 4)


def test_scans_add_up_and_ignored_lesions_do_not_count() -> None:
    found = measure(BrightSpots(), case_of(), case_of(frozenset({1})))
    assert found["solid"] == ProposalRecall(3, 3)
    assert found["ground_glass"] == ProposalRecall(2, 2)


def test_nothing_to_find_has_no_recall() -> None:
    found = measure(BrightSpots(), case_of(frozenset({1, 2})))
    assert found["all"].share is None
