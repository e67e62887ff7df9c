"""The feature pyramid against torchvision's, and its ablations against what they leave out."""

from __future__ import annotations

from collections import OrderedDict
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from medvision.models.config import RetinaNetConfig
from medvision.models.pyramid import FeaturePyramid
from medvision.models.pyramid_config import PyramidPaths
from medvision.models.retinanet import build_retinanet

CHANNELS = [8, 16, 32]
SIZES = (((4.0, 4.0), (6.0, 7.0)), ((9.0, 9.0), (13.0, 12.0)), ((20.0, 18.0), (30.0, 33.0)))


def make_maps(rows: int = 16, columns: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            2, channels, -(-rows // (1 << level)), -(-columns // (1 << level)), generator=generator
        )
        for level, channels in enumerate(CHANNELS)
    ]


def make_pyramid(paths: PyramidPaths = "full") -> FeaturePyramid:
    torch.manual_seed(1)
    pyramid = FeaturePyramid(CHANNELS, 12, paths).eval()
    for part in pyramid.modules():
        if isinstance(part, nn.Conv2d) and part.bias is not None:
            nn.init.normal_(part.bias)
    return pyramid


@pytest.mark.parametrize("size", [(16, 24), (15, 21)])
def test_levels_equal_torchvisions_with_the_same_weights(size: tuple[int, int]) -> None:
    ours, theirs = make_pyramid(), FeaturePyramidNetwork(CHANNELS, 12).eval()
    for index in range(len(CHANNELS)):
        theirs.inner_blocks[index][0].load_state_dict(ours.lateral[index].state_dict())
        theirs.layer_blocks[index][0].load_state_dict(ours.smooth[index].state_dict())
    maps = make_maps(*size)
    expected = theirs(OrderedDict((str(index), value) for index, value in enumerate(maps)))
    for level, value in zip(ours(maps), expected.values(), strict=True):
        torch.testing.assert_close(level, value, atol=1e-5, rtol=1e-5)


def test_the_default_has_the_names_that_runs_before_it_saved() -> None:
    parts = [f"{part}.{index}" for part in ("lateral", "smooth") for index in range(3)]
    expected = {f"{part}.{name}" for part in parts for name in ("weight", "bias")}
    assert set(FeaturePyramid(CHANNELS, 12).state_dict()) == expected


def influences(pyramid: FeaturePyramid) -> list[list[bool]]:
    """Tell for each level which backbone maps it depends on."""
    seen = []
    for index in range(pyramid.levels):
        maps = [value.requires_grad_() for value in make_maps()]
        gradients = torch.autograd.grad(pyramid(maps)[index].sum(), maps, allow_unused=True)
        seen.append([gradient is not None and bool(gradient.any()) for gradient in gradients])
    return seen


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("full", ["xxx", ".xx", "..x"]),
        ("top-down-only", ["..x", "..x", "..x"]),
        ("lateral-only", ["x..", ".x.", "..x"]),
        ("finest-only", ["xxx"]),
    ],
)
def test_each_ablation_leaves_out_what_it_says(paths: PyramidPaths, expected: list[str]) -> None:
    seen = influences(make_pyramid(paths))
    assert ["".join("x" if used else "." for used in row) for row in seen] == expected


def test_the_finest_level_alone_is_that_of_the_whole_pyramid() -> None:
    whole, finest = make_pyramid(), make_pyramid("finest-only")
    assert not finest.load_state_dict(whole.state_dict(), strict=False).missing_keys
    (level,) = finest(make_maps())
    torch.testing.assert_close(level, whole(make_maps())[0])


def test_top_down_and_lateral_levels_by_hand() -> None:
    maps, down, lateral = make_maps(), make_pyramid("top-down-only"), make_pyramid("lateral-only")
    coarse = down.lateral[0](maps[2])
    for index, (level, smooth) in enumerate(zip(down(maps), down.smooth, strict=True)):
        factor = 4 >> index
        enlarged = coarse.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        torch.testing.assert_close(level, smooth(enlarged))
    for level, smooth, one, features in zip(
        lateral(maps), lateral.smooth, lateral.lateral, maps, strict=True
    ):
        torch.testing.assert_close(level, smooth(one(features)))


@pytest.mark.parametrize("paths", get_args(PyramidPaths))
def test_a_detector_runs_on_every_pyramid(paths: PyramidPaths) -> None:
    levels = 1 if paths == "finest-only" else 3
    config = RetinaNetConfig(
        width=8, pyramid_channels=16, pyramid=paths, anchor_sizes=SIZES[:levels]
    )
    network = build_retinanet(config, 3, 2).eval()
    assert network.strides == config.strides == [4, 8, 16][:levels]
    raw = network(torch.rand(1, 3, 64, 96))
    cells = sum((64 // stride) * (96 // stride) for stride in config.strides)
    assert raw.boxes.shape == (1, cells * 2, 4)
    assert torch.isfinite(raw.boxes).all()


def test_anchors_of_three_levels_are_refused_for_one() -> None:
    with pytest.raises(ValidationError, match="each of 1 pyramid"):
        RetinaNetConfig(pyramid="finest-only", anchor_sizes=SIZES)
