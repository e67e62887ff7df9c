"""The U-Net against the paper's numbers, and the laws that hold for every setting of it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medvision.detector import load_weights, save_weights
from medvision.errors import InputError, UsageError
from medvision.models.backbone import ResNet
from medvision.models.flips import MIRRORED_AXES
from medvision.models.unet import UNet, build_unet
from medvision.models.unet_config import (
    UNetConfig,
    fitting_input_size,
    valid_output_size,
)
from medvision.models.unet_criterion import SegmentationCriterion, SegmentationTarget

PAPER = {"base_channels": 64, "norm": "none", "padding": "valid", "inner_windows": ()}
SMALL = {"depth": 2, "base_channels": 4, "inner_windows": ()}


def make(classes: int = 2, **settings: object) -> UNet:
    torch.manual_seed(0)
    return build_unet(UNetConfig(**{**SMALL, **settings}), 3, classes)


def with_live_norms(network: UNet) -> UNet:
    """Give batch norms statistics and affine values that are not those of a fresh network."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.2, 0.2)
    nn.init.normal_(network.heads[0].weight)
    return network.eval()


@torch.no_grad()
def logits_of(network: UNet, images: Tensor) -> Tensor:
    return network(images).logits


def test_the_papers_network_takes_572_to_388_through_28() -> None:
    config = UNetConfig(**{**PAPER, "base_channels": 2})
    network = build_unet(config, 1, 1).eval()
    images = torch.zeros(1, 1, 572, 572)
    sides = [part.shape[-1] for part in network.encoder(images)]
    assert sides == [568, 280, 136, 64, 28]
    assert logits_of(network, images).shape == (1, 2, 388, 388)
    assert valid_output_size(572, 4) == 388


def test_the_papers_network_has_its_channels_and_parameters() -> None:
    with torch.device("meta"):
        network = build_unet(UNetConfig(**PAPER), 1, 1)
    assert network.encoder.channels == [64, 128, 256, 512, 1024]
    # The convolutions of figure 1 one by one: kernel side, channels in, channels out.
    layers = [(3, 1, 64), (3, 64, 64)]
    for width in (64, 128, 256, 512):
        layers += [(3, width, 2 * width), (3, 2 * width, 2 * width)]
        layers += [(2, 2 * width, width), (3, 2 * width, width), (3, width, width)]
    layers += [(1, 64, 2)]
    expected = sum(side**2 * before * after + after for side, before, after in layers)
    assert sum(value.numel() for value in network.parameters()) == expected == 31_030_658


def test_skips_are_concatenated_at_their_own_resolution() -> None:
    network = make(base_channels=4, depth=3)
    seen: list[tuple[int, ...]] = []
    for step in network.decoder.steps:
        step.convolve.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    maps = network.encoder(torch.zeros(1, 3, 32, 24))
    network.decoder(maps)
    # Half of the channels come from the encoder's map of that size, half from below.
    assert seen == [(1, 32, 8, 6), (1, 16, 16, 12), (1, 8, 32, 24)]


@settings(max_examples=25)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(["transposed", "bilinear", "nearest"]),
    st.sampled_from(["max", "average", "stride"]),
    st.sampled_from(["batch", "instance", "group", "none"]),
)
def test_output_has_the_inputs_size_whatever_it_is(
    rows: int, columns: int, upsampling: str, pooling: str, norm: str
) -> None:
    network = make(upsampling=upsampling, pooling=pooling, norm=norm).eval()
    logits = logits_of(network, torch.rand(1, 3, rows, columns))
    assert logits.shape == (1, 3, rows, columns)
    assert torch.isfinite(logits).all()


@given(st.integers(1, 5), st.integers(1, 700))
def test_sizes_without_padding_follow_the_convolutions(depth: int, size: int) -> None:
    fitting = fitting_input_size(size, depth)
    output = valid_output_size(fitting, depth)
    # What the borders cost depends on the depth alone.
    assert fitting - output == valid_margin(depth)
    assert (fitting - 4) % 2 == 0
    if fitting > size:
        with pytest.raises(InputError, match=f"no side of {size} "):
            valid_output_size(size, depth)


def valid_margin(depth: int) -> int:
    # Two convolutions cost 4 pixels of the resolution they run at, down and up.
    return sum(4 * (1 << level) * (1 if level == depth else 2) for level in range(depth + 1))


def test_a_size_that_does_not_fit_is_refused_with_one_that_does() -> None:
    network = make(padding="valid").eval()
    with pytest.raises(InputError, match="no side of 61 pixels") as caught:
        network(torch.zeros(1, 3, 60, 61))
    assert caught.value.do is not None
    assert "Give 64 pixels" in caught.value.do


@pytest.mark.parametrize("pooling", ["max", "average", "stride"])
@pytest.mark.parametrize("upsampling", ["transposed", "nearest"])
def test_valid_is_the_middle_of_same(upsampling: str, pooling: str) -> None:
    chosen = {"upsampling": upsampling, "pooling": pooling}
    valid = with_live_norms(make(padding="valid", **chosen))
    same = with_live_norms(make(padding="same", **chosen))
    tensors = {**valid.state_dict(), "architecture": same.architecture}
    same.load_state_dict(tensors)
    images = torch.rand(2, 3, 76, 92)
    inner = logits_of(valid, images)
    rows, columns = inner.shape[-2:]
    # Without padding the cells of stride 4 start at pixel 2 + 2 * 2, so those of same must start at 2.
    top, left = (76 - rows) // 2 - 2, (92 - columns) // 2 - 2
    outer = logits_of(same, images[..., 2:, 2:])[..., top : top + rows, left : left + columns]
    # The first four rows and columns look at the two that were cut off.
    torch.testing.assert_close(inner[..., 4:, 4:], outer[..., 4:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("upsampling", ["transposed", "bilinear", "nearest"])
@pytest.mark.parametrize("pooling", ["max", "average", "stride"])
def test_a_shift_by_the_coarsest_stride_shifts_the_output(upsampling: str, pooling: str) -> None:
    network = with_live_norms(make(upsampling=upsampling, pooling=pooling))
    stride = network.strides[-1]
    assert stride == 4
    large = torch.rand(1, 3, 80 + stride, 96 + stride)
    first = logits_of(network, large[..., :80, :96])
    second = logits_of(network, large[..., stride:, stride:])
    border = (
        32  # padding reaches 20 pixels at depth 2, 6 more by bilinear steps, and the shift is 4
    )
    inner = (..., slice(border, 80 - border), slice(border, 96 - border))
    moved = (..., slice(border - 4, 76 - border), slice(border - 4, 92 - border))
    torch.testing.assert_close(second[moved], first[inner], atol=1e-5, rtol=1e-4)
    assert (second[inner] - first[inner]).abs().max() > 1e-2


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "none"])
def test_predictions_do_not_depend_on_the_rest_of_the_batch(norm: str) -> None:
    network = with_live_norms(make(norm=norm, dropout=0.5))
    images = torch.rand(4, 3, 36, 29) * torch.tensor([1.0, 0.1, 1.0, 0.5])[:, None, None, None]
    together = logits_of(network, images)
    alone = torch.cat([logits_of(network, image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_instance_norm_is_torchs_own_and_takes_single_pixels() -> None:
    from medvision.models.unet_blocks import InstanceNorm

    ours, theirs = InstanceNorm(6), nn.InstanceNorm2d(6, affine=True)
    features = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(ours(features), theirs(features))
    assert ours(torch.randn(1, 6, 1, 1)).abs().max() < 1e-4


def test_dropout_hides_whole_channels_of_the_coarsest_map_in_training_only() -> None:
    network = make(dropout=0.5, norm="none").train()
    seen: list[Tensor] = []
    network.decoder.steps[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.rand(2, 3, 16, 16)
    network(images)
    network.eval()(images)
    hidden, whole = ((part == 0).all(dim=(2, 3)).sum().item() for part in seen)
    assert hidden > whole


@pytest.mark.parametrize("flips", [True, False])
def test_mean_over_mirror_images_is_mirrored_with_the_picture(flips: bool) -> None:
    network = with_live_norms(make())
    images = torch.rand(2, 3, 40, 48)

    def probabilities(given: Tensor) -> Tensor:
        views = [
            torch.softmax(logits_of(network, given.flip(axes)), dim=1).flip(axes)
            for axes in (MIRRORED_AXES if flips else ((),))
        ]
        return torch.stack(views).mean(dim=0)

    straight, mirrored = probabilities(images), probabilities(images.flip(-1)).flip(-1)
    torch.testing.assert_close(straight.sum(dim=1), torch.ones(2, 40, 48))
    assert torch.allclose(straight, mirrored, atol=1e-5) == flips


class Maps(nn.Module):
    """A feature extractor with a map at every given stride: the picture's mean pixels."""

    def __init__(self, strides: list[int], channels: list[int]) -> None:
        super().__init__()
        self.strides, self.channels, self.calls = strides, channels, 0

    def forward(self, images: Tensor) -> list[Tensor]:
        self.calls += 1
        return [
            nn.functional.avg_pool2d(images, stride)[:, :1].expand(-1, channels, -1, -1)
            for stride, channels in zip(self.strides, self.channels, strict=True)
        ]


@pytest.mark.parametrize(
    "strides", [[2, 4, 8, 16], [4, 8, 16, 32], [1, 2, 4], [4, 16], [2, 4, 8, 8], [8]], ids=str
)
def test_any_feature_extractor_serves_as_encoder(strides: list[int]) -> None:
    config = UNetConfig(encoder="maps", depth=strides[-1].bit_length() - 1, base_channels=2)
    encoder = Maps(strides, list(range(3, 3 + len(strides))))
    network = build_unet(config, 3, 2, encoder).eval()
    assert logits_of(network, torch.rand(2, 3, 37, 50)).shape == (2, 3, 37, 50)
    assert encoder.calls == 1
    joined = [skip for skip in network.decoder.skips if skip is not None]
    assert joined == list(range(len(strides) - 1))[::-1]
    assert network.decoder.strides[-1] == 1


def test_a_resnet_serves_as_encoder_and_learns() -> None:
    encoder = ResNet(6, (1, 1, 1, 1), width=8)
    network = build_unet(UNetConfig(encoder="resnet", base_channels=4), 3, 1, encoder)
    output = network(torch.rand(2, 3, 50, 41))
    assert output.logits.shape == (2, 2, 50, 41)
    output.logits.square().sum().backward()
    assert all(value.grad is not None for value in network.parameters())


@pytest.mark.parametrize(
    ("name", "depth", "finest"), [("resnet18", 4, 2), ("resnet18", 5, 2), ("resnet18-narrow", 5, 4)]
)
def test_a_backbone_serves_by_its_name(name: str, depth: int, finest: int) -> None:
    network = build_unet(UNetConfig(encoder=name, depth=depth, base_channels=2), 3, 1).eval()
    assert network.encoder.strides[0] == finest
    assert logits_of(network, torch.rand(1, 3, 33, 40)).shape == (1, 2, 33, 40)


def test_an_encoder_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean resnet18"):
        build_unet(UNetConfig(encoder="resnet-18", depth=4), 3, 1)
    config = UNetConfig(encoder="resnet18", depth=4)
    with pytest.raises(UsageError, match="stride 32") as caught:
        build_unet(config, 3, 1, Maps([4, 8, 16, 32], [1, 1, 1, 1]))
    assert caught.value.do == "Set depth to 5."


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_deep_supervision_adds_outputs_of_the_same_size_in_training_only(padding: str) -> None:
    network = make(depth=3, padding=padding, deep_supervision=(0.5, 0.25))
    images = torch.rand(2, 3, 100, 116)
    raw = network.train()(images)
    assert [part.shape for part in raw.auxiliary] == [raw.logits.shape] * 2
    raw = network.eval()(images)
    assert raw.auxiliary == ()


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_every_output_looks_at_the_pixel_that_it_judges(padding: str) -> None:
    chosen = {"depth": 3, "padding": padding, "pooling": "average", "norm": "none"}
    network = make(**chosen, deep_supervision=(0.5, 0.25), upsampling="nearest").train()
    images = torch.rand(1, 3, 132, 132, requires_grad=True)
    raw = network(images)
    offset = (132 - raw.logits.shape[-1]) // 2
    # Without padding the coarsest cells start at 2 + 2 * 2 + 2 * 4 pixels, 6 into those of same.
    top, left = (62, 46) if padding == "valid" else (64, 48)
    row, column = top - offset, left - offset
    for logits, stride in zip((raw.logits, *raw.auxiliary), (1, 2, 4), strict=True):
        # A square on the grid of all strides: its field of view must be centred on it.
        part = logits[..., row : row + 8, column : column + 8].sum()
        (gradient,) = torch.autograd.grad(part, images, retain_graph=True)
        used = gradient.abs().sum(dim=(0, 1)) > 0
        rows, columns = used.any(dim=1).nonzero(), used.any(dim=0).nonzero()
        assert (rows.min() + rows.max() + 1).item() == 2 * top + 8, stride
        assert (columns.min() + columns.max() + 1).item() == 2 * left + 8, stride


def batch(classes: int = 2) -> tuple[Tensor, list[SegmentationTarget]]:
    """Four crops with a square each, of the class that its brightness tells, and an ignored strip."""
    torch.manual_seed(1)
    images = torch.rand(4, 3, 24, 24) * 0.2
    maps = torch.zeros(4, 24, 24, dtype=torch.uint8)
    for number in range(3):  # the last crop is empty
        place = (number, slice(4 + number, 12), slice(5, 11 + 2 * number))
        maps[place] = 1 + number % classes
        images[number, :, place[1], place[2]] += 0.4 * (1 + number % classes)
    maps[:, 20:] = 255
    return images, [{"class_map": part} for part in maps]


NAMES = ["dice", "cross_entropy", "focal", "tversky", "focal_tversky"]
OFF = dict.fromkeys(NAMES, 0.0)


@pytest.mark.parametrize(
    "loss",
    [*({name: 1.0} for name in NAMES), {"dice": 0.5, "focal": 2.0, "cross_entropy": 1.0}],
    ids=lambda loss: "+".join(loss),
)
def test_every_loss_overfits_one_batch(loss: dict[str, float]) -> None:
    network = make(base_channels=8, loss={**OFF, **loss}, deep_supervision=(0.5,)).train()
    config = UNetConfig(**{**SMALL, "loss": {**OFF, **loss}, "deep_supervision": (0.5,)})
    criterion = SegmentationCriterion(config, torch.ones(2))
    images, targets = batch()
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(150):
        raw = network(images)
        losses = criterion(raw, targets)
        assert set(losses) == set(loss)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    truth = torch.stack([target["class_map"] for target in targets])
    # The coarser output cannot draw every corner; the finest must.
    found = raw.logits.argmax(dim=1)
    assert (found == truth)[truth != 255].float().mean() > 0.995
    finest = criterion(raw._replace(auxiliary=()), targets)
    assert sum(value.item() for value in finest.values()) < 0.05


OTHERS = {
    "depth": 3,
    "base_channels": 8,
    "norm": "group",
    "dropout": 0.1,
    "upsampling": "nearest",
    "padding": "valid",
    "pooling": "average",
    "deep_supervision": (1.0,),
    "inner_windows": ((0.1, 0.4),),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_weights_of_another_configuration_are_refused(name: str, tmp_path: Path) -> None:
    config = UNetConfig(**SMALL)
    network = make()
    save_weights(tmp_path / "w.safetensors", network.state_dict(), {})
    tensors, _ = load_weights(tmp_path / "w.safetensors")
    build_unet(config, 3, 2).load_state_dict(tensors)
    other = UNetConfig(**{**SMALL, name: OTHERS[name]})
    stranger = build_unet(other, 3, 2)
    before = copy.deepcopy(stranger.state_dict())
    with pytest.raises(InputError, match=f"of a U-Net with {name} .*; the configuration says"):
        stranger.load_state_dict(tensors)
    assert all(torch.equal(value, before[key]) for key, value in stranger.state_dict().items())


def test_weights_of_other_slices_classes_or_networks_are_refused() -> None:
    tensors, config = make().state_dict(), UNetConfig(**SMALL)
    with pytest.raises(InputError, match="classes 2; the configuration says 5"):
        build_unet(config, 3, 5).load_state_dict(tensors)
    with pytest.raises(InputError, match="n_slices 3; the configuration says 7"):
        build_unet(config, 7, 2).load_state_dict(tensors)
    # Weights without a record are refused by torch, which misses theirs.
    with pytest.raises(RuntimeError, match="architecture"):
        build_unet(config, 3, 2).load_state_dict(nn.Conv2d(1, 1, 1).state_dict())
    damaged = {**tensors, "architecture": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    with pytest.raises(InputError, match="damaged"):
        build_unet(config, 3, 2).load_state_dict(damaged)


def test_loss_weights_may_change_without_refusal() -> None:
    first = UNetConfig(**SMALL, deep_supervision=(0.5,))
    second = UNetConfig(**SMALL, deep_supervision=(0.3,), loss={"focal": 1.0})
    build_unet(second, 3, 2).load_state_dict(build_unet(first, 3, 2).state_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        {"padding": "valid", "encoder": "resnet18"},
        {"pooling": "average", "encoder": "resnet18"},
        {"depth": 2, "deep_supervision": (0.5, 0.5)},
        {"deep_supervision": (0.0,)},
        {"inner_windows": ((0.5, 0.5),)},
        {"loss": OFF},
        {"norm": "layer"},
        {"width": 3},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        UNetConfig(**wrong)


class OnlyLogits(nn.Module):
    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def test_bfloat16_channels_last_and_tracing_change_nothing_that_matters() -> None:
    network = with_live_norms(make())
    images = torch.rand(2, 3, 30, 45)
    plain = logits_of(network, images)
    last = logits_of(
        copy.deepcopy(network).to(memory_format=torch.channels_last),
        images.to(memory_format=torch.channels_last),
    )
    torch.testing.assert_close(last, plain, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = logits_of(network, images)
    assert half.dtype == torch.float32
    assert (half - plain).abs().max() < 0.05 * plain.abs().max()
    traced = torch.jit.trace(OnlyLogits(network), torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(traced(images), plain, atol=1e-4, rtol=1e-4)


def test_a_fresh_network_expects_few_lesions() -> None:
    for classes, norm in itertools.product((1, 4), ("batch", "none")):
        network = make(classes, norm=norm).train()
        probability = torch.softmax(network(torch.rand(4, 3, 32, 32)).logits, dim=1)
        assert (1 - probability[:, 0]).mean().item() == pytest.approx(0.1, abs=0.03)
