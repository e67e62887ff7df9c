"""Faster R-CNN with deformable RoI pooling as a graph: the same outputs, with bins that have moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_support import needs_onnx, small_detector
from torch import nn

from medvision.detector import load_detector, save_detector_config, save_weights
from medvision.export.check import TOLERANCE
from medvision.export.graph import export_run
from medvision.models.faster_rcnn import build_faster_rcnn
from medvision.models.two_stage_config import (
    FasterRCNNConfig,
    LevelRuleConfig,
    ProposalConfig,
    RegionConfig,
)

MODEL = FasterRCNNConfig(
    blocks=(1, 1, 1, 1),
    width=8,
    pyramid_channels=8,
    anchors_per_level=1,
    anchor_sizes=(((4.0, 4.0),), ((9.0, 9.0),), ((20.0, 18.0),)),
    proposals=ProposalConfig(pre_nms_top_n=40, post_nms_top_n=25),
    level_rule=LevelRuleConfig(k0=3, canonical_size=8.0),
    regions=RegionConfig(pooling="deformable", width=32),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run whose outputs are not all alike and whose bins lie far from where they began."""
    torch.manual_seed(0)
    network = build_faster_rcnn(MODEL, 3, 2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_mean"), -0.2, 0.2)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2.0)
    for head in (network.proposal_head, network.box_head):
        for value in head.parameters():
            deviation = 2 / value[0].numel() ** 0.5 if value.ndim > 1 else 1.0
            nn.init.normal_(value, std=deviation)
    fc = network.get_submodule("box_pool.pool.fc")
    for value in fc.parameters():
        nn.init.normal_(value, std=1.0)
    save_detector_config(tmp_path, small_detector(MODEL))
    save_weights(tmp_path / "best.safetensors", network.state_dict(), {})
    return tmp_path


@pytest.mark.parametrize(
    "kind", ["torchscript", pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow])]
)
def test_a_detector_whose_bins_have_moved_is_exported(run: Path, kind: str) -> None:
    done = export_run(run, format=kind)
    assert done.model.check.largest_difference <= TOLERANCE
    assert len(done.model.check.sizes) == 2


def test_the_bins_have_moved_so_that_it_shows(run: Path) -> None:
    network, _, _ = load_detector(run)
    images = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        moved = network(images)
        fc = network.get_submodule("box_pool.pool.fc")
        for value in fc.parameters():
            nn.init.zeros_(value)
        unmoved = network(images)
    gap = (moved.logits - unmoved.logits).abs()
    assert gap.median() > 100 * TOLERANCE
