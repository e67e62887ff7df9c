"""Backbones: sizes, counts and features against torchvision's; norms; the first convolution."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozen

from medvision.errors import UsageError
from medvision.models.backbones import build_backbone, expected_input
from medvision.models.config import RetinaNetConfig
from medvision.models.family import check_backbone
from medvision.models.first_convolution import adapt_first_convolution, fold_input_scale
from medvision.models.norms import FrozenBatchNorm2d, convert_norms, group_count
from medvision.models.timm_backbone import TimmFeatures, check_map_sizes

# With the classifier of 1000 classes, as torchvision's documentation lists them.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


def count(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def shaken(module: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that no default has."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.get_buffer("running_mean"), 0, 0.2)
            nn.init.uniform_(part.get_buffer("running_var"), 0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    return module


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, 3)
    classifier = 1000 * backbone.channels[-1] + 1000
    assert count(backbone) + classifier == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_those_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, 3)
        maps = backbone(torch.empty(1, 3, 224, 224))
    assert [tuple(one.shape[2:]) for one in maps] == [(n, n) for n in (112, 56, 28, 14, 7)]
    assert [one.shape[1] for one in maps] == backbone.channels
    assert backbone.strides == [2, 4, 8, 16, 32]
    deep = name not in ("resnet18", "resnet34")
    wide = [256, 512, 1024, 2048] if deep else [64, 128, 256, 512]
    assert backbone.channels == [64, *wide]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet18-narrow"])
def test_without_pooling_every_stage_is_twice_as_fine(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, 5, stem_pooling=False)
        maps = backbone(torch.empty(2, 5, 96, 160))
    assert backbone.strides == [2, 4, 8, 16]
    assert [tuple(one.shape[2:]) for one in maps] == [(96 // s, 160 // s) for s in (2, 4, 8, 16)]
    assert [one.shape[1] for one in maps] == backbone.channels


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_torchvisions_with_its_weights(name: str) -> None:
    judge = shaken(torchvision.models.get_model(name, weights=None)).eval()
    nodes = {"relu": "0", "layer1": "1", "layer2": "2", "layer3": "3", "layer4": "4"}
    backbone = build_backbone(name, 3).eval()
    missing, extra = backbone.load_state_dict(judge.state_dict(), strict=False)
    assert (missing, extra) == ([], ["fc.weight", "fc.bias"])
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = create_feature_extractor(judge, nodes)(images).values()
        found = backbone(images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_eval_does_not_depend_on_the_rest_of_the_batch_nor_shift_on_the_place() -> None:
    backbone = shaken(build_backbone("resnet18", 2)).eval()
    images = torch.zeros(2, 2, 256, 256)
    images[:, :, 96:128, 96:128] = torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        together, alone = backbone(images)[2], backbone(images[1:])[2]
        moved = backbone(images[1:].roll((32, -32), (2, 3)))[2]
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)
    # Away from the border, which the padding makes different, 32 pixels are 4 cells of stride 8.
    torch.testing.assert_close(
        moved[..., 14:22, 6:14], alone[..., 10:18, 10:18], rtol=1e-4, atol=1e-4
    )


def test_unknown_names_get_a_guess() -> None:
    with pytest.raises(UsageError, match=r"Did you mean resnet50\?"):
        build_backbone("resnet5O", 3)


def test_without_timm_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="needs the package timm"):
        build_backbone("timm/resnet18", 3)
    with pytest.raises(UsageError, match="needs the package timm"):
        expected_input("timm/resnet18")


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_050"])
def test_timm_models_give_what_they_declare(name: str) -> None:
    pytest.importorskip("timm")
    backbone = build_backbone(f"timm/{name}", 5).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 5, 64, 128))
    assert backbone.strides == [2, 4, 8, 16, 32]
    for one, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert tuple(one.shape) == (1, channels, 64 // stride, 128 // stride)


def test_timm_refusals() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match="no model 'resnet81'"):
        build_backbone("timm/resnet81", 3)
    with pytest.raises(UsageError, match="left out of a ResNet only"):
        build_backbone("timm/resnet18", 3, stem_pooling=False)
    with pytest.raises(UsageError, match="convolutions of timm/resnet18 cannot be changed"):
        build_backbone("timm/resnet18", 3, stage_convolution="dilated")
    with pytest.raises(UsageError, match="224 x 224 pixels only"):
        build_backbone("timm/swin_tiny_patch4_window7_224", 3)


@pytest.mark.parametrize("name", ["resnet18", "resnet18-narrow", "timm/tf_efficientnet_lite0"])
def test_frozen_norms_change_no_feature_and_learn_nothing(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    backbone = shaken(build_backbone(name, 3)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(images)
        frozen = convert_norms(copy.deepcopy(backbone), "frozen").train()
        found = frozen(images)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in frozen.modules())
    assert count(frozen) < count(backbone)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    frozen.load_state_dict(backbone.state_dict())


def test_frozen_norm_is_torchvisions_and_keeps_bfloat16() -> None:
    ours, judge = FrozenBatchNorm2d(8), TorchvisionFrozen(8)
    state = {name: torch.rand(8) + 0.5 for name in judge.state_dict()}
    ours.load_state_dict(state)
    judge.load_state_dict(state)
    images = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(ours(images), judge(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(images.bfloat16()).dtype == torch.bfloat16


def test_frozen_without_weights_still_lets_signals_through_the_blocks() -> None:
    backbone = build_backbone("resnet18", 1, norm="frozen")
    scales = [p.weight for p in backbone.modules() if isinstance(p, FrozenBatchNorm2d)]
    assert len(scales) == 20
    assert all((scale == 1).all() for scale in scales)


@pytest.mark.parametrize("name", ["resnet50", "resnet18-narrow", "timm/tf_efficientnet_lite0"])
def test_group_norm_sees_one_image_at_a_time(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    backbone = build_backbone(name, 3, norm="group").train()
    if name.startswith("timm/"):
        backbone.eval()  # timm's blocks may drop paths in training
    assert not any(isinstance(part, nn.BatchNorm2d) for part in backbone.modules())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        together, alone = backbone(images), backbone(images[:1])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[:1], other, rtol=1e-3, atol=1e-4)


def test_group_counts() -> None:
    assert [group_count(channels) for channels in (64, 256, 40, 24, 7)] == [32, 32, 8, 8, 1]


@pytest.mark.parametrize("in_channels", [1, 3, 5, 9])
def test_repeated_image_gets_the_response_it_had(in_channels: int) -> None:
    torch.manual_seed(in_channels)
    weight, grey = torch.randn(8, 3, 7, 7), torch.randn(2, 1, 32, 32)
    adapted = adapt_first_convolution(weight, in_channels)
    assert adapted.shape == (8, in_channels, 7, 7)
    expected = respond(grey.expand(-1, 3, -1, -1), weight)
    found = respond(grey.expand(-1, in_channels, -1, -1), adapted)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if in_channels == 3:
        torch.testing.assert_close(adapted, weight, rtol=0, atol=0)


@settings(max_examples=20)
@given(st.integers(1, 40))
def test_response_is_kept_for_any_number_of_channels(in_channels: int) -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    adapted = adapt_first_convolution(weight, in_channels)
    torch.testing.assert_close(adapted.sum(1), weight.sum(1))
    if in_channels >= 3:  # no channel is left without weights
        assert (adapted.abs().amax(dim=(0, 2, 3)) > 0).all()


def test_only_three_channels_can_be_adapted() -> None:
    with pytest.raises(UsageError, match=r"shape \(4, 6, 3, 3\)"):
        adapt_first_convolution(torch.randn(4, 6, 3, 3), 5)


def test_folded_weights_see_minus_one_to_one() -> None:
    mean, std = expected_input("resnet18")
    assert mean == (0.485, 0.456, 0.406)
    weight, values = torch.randn(8, 3, 7, 7), torch.rand(1, 3, 40, 40)
    shift, scale = (torch.tensor(row)[None, :, None, None] for row in (mean, std))
    expected = nn.functional.conv2d((values - shift) / scale, weight)
    folded, lacking = fold_input_scale(weight, mean, std)
    found = nn.functional.conv2d(values * 2 - 1, folded) + lacking[None, :, None, None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def respond(images: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.conv2d(images, weight, stride=2, padding=3)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("timm/xception", "gives a map of"),
        ("timm/inception_v3", "gives a map of"),
        ("timm/halonet26t", "does not take images of"),
    ],
)
def test_a_timm_model_whose_maps_do_not_fit_is_refused_before_any_scan_is_read(
    name: str, told: str
) -> None:
    pytest.importorskip("timm")
    config = RetinaNetConfig(backbone=name, stem_pooling=True)
    with pytest.raises(UsageError, match=told):
        check_backbone(config, 3)


def test_only_the_maps_that_are_used_must_fit() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        backbone = TimmFeatures("xception", 3)
    with pytest.raises(UsageError, match="at stride 2 for 96 x 128 pixels; 48 x 64 is needed"):
        check_map_sizes(backbone, [2, 16, 32])
    check_map_sizes(backbone, [16, 32])


def test_same_padding_is_timms_where_sides_are_multiples_of_the_stride() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    judge = timm.create_model("tf_efficientnet_lite0", features_only=True, pretrained=False).eval()
    ours = build_backbone("timm/tf_efficientnet_lite0", 3).eval()
    ours.load_state_dict({f"body.{name}": value for name, value in judge.state_dict().items()})
    assert not any(type(part).__name__ == "Conv2dSame" for part in ours.modules())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for found, expected in zip(ours(images), judge(images), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_norm_that_is_not_there_cannot_be_changed() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match="convnext_atto has no batch norm that could be frozen"):
        build_backbone("timm/convnext_atto", 3, norm="frozen")
