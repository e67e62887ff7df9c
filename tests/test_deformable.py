"""Deformable convolution and RoI pooling against torchvision's operators, and against their own start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torchvision import ops
from torchvision.models import resnet18, resnet50

from medvision.errors import UsageError
from medvision.models.deformable import DeformConv2d, deform_conv2d, deform_stages
from medvision.models.deformable_roi import DeformRoIAlign, deform_roi_align, roi_align

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "without mask": {"masked": False},
    "far outside": {"reach": 40.0},
    "stride 2, non-square": {"size": (9, 14), "stride": (2, 2)},
    "dilation 2": {"dilation": (2, 2), "padding": (2, 2)},
    "groups": {"groups": 2},
    "offset groups": {"offset_groups": 4},
    "both groups": {"groups": 3, "offset_groups": 2},
    "odd kernel": {"kernel": (1, 5), "padding": (0, 3), "stride": (1, 2), "dilation": (1, 2)},
    "one pixel": {"size": (1, 1)},
    "no padding": {"padding": (0, 0)},
    "whole offsets": {"whole": True},
}


def make(
    size: tuple[int, int] = (7, 11),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
    masked: bool = True,
    whole: bool = False,
    reach: float = 2.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    channels: int = 12,
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Return random map, offset, weight, bias and mask, and the constants."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    taps = kernel[0] * kernel[1] * offset_groups
    offset = normal(2, 2 * taps, *out) * reach
    values = [
        normal(2, channels, *size),
        offset.round() if whole else offset,
        normal(6, channels // groups, *kernel) / 6,
        normal(6),
        normal(2, taps, *out) if masked else None,
    ]
    return values, {"stride": stride, "padding": padding, "dilation": dilation}


def run(function: Any, values: list[Tensor | None], constants: dict[str, Any]) -> list[Tensor]:
    """Return the output and the gradient of each value for one random gradient of the output."""
    leaves = [None if v is None else v.clone().requires_grad_() for v in values]
    maps, offset, weight, bias, mask = leaves
    output = function(maps, offset, weight, bias, mask=mask, **constants)
    # Drawn in one type: a generator gives other numbers in another.
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    output.backward(grad)
    return [output.detach()] + [v.grad for v in leaves if v is not None and v.grad is not None]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_output_and_gradients_are_torchvisions(name: str, channels_last: bool) -> None:
    values, constants = make(**CASES[name])
    if channels_last:
        values = [
            v.contiguous(memory_format=torch.channels_last) if v is not None and v.ndim == 4 else v
            for v in values
        ]
    ours, theirs = (run(f, values, constants) for f in (deform_conv2d, ops.deform_conv2d))
    assert len(ours) == len(theirs) == (5 if values[4] is None else 6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    reach=st.sampled_from([0.0, 0.5, 4.0, 1e6]),
    seed=st.integers(0, 10**6),
)
def test_any_geometry_is_torchvisions(**drawn: Any) -> None:
    values, constants = make(**drawn, channels=4)
    ours, theirs = (run(f, values, constants) for f in (deform_conv2d, ops.deform_conv2d))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [{}, {"masked": False, "stride": (2, 2)}, {"groups": 2}])
def test_gradients_are_those_of_the_formula(case: dict[str, Any]) -> None:
    values, constants = make(size=(4, 5), channels=4, dtype=torch.float64, **case)
    leaves = [v.requires_grad_() for v in values if v is not None]

    def function(
        maps: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        return deform_conv2d(maps, offset, weight, bias, mask=mask, **constants)

    assert torch.autograd.gradcheck(function, leaves)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    values, constants = make()
    full = run(deform_conv2d, values, constants)[1:]
    for index in range(5):
        leaves = [v.clone() for v in values if v is not None]
        leaves[index].requires_grad_()
        maps, offset, weight, bias, mask = leaves
        output = deform_conv2d(maps, offset, weight, bias, mask=mask, **constants)
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(9)))
        for other, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (other == index)
        torch.testing.assert_close(leaves[index].grad, full[index])


def test_an_empty_batch_gives_an_empty_output() -> None:
    layer = DeformConv2d(4, 6, 3, padding=1)
    maps = torch.zeros(0, 4, 8, 9, requires_grad=True)
    output = layer(maps)
    assert output.shape == (0, 6, 8, 9)
    output.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_a_place_that_is_no_number_gives_an_output_that_is_none() -> None:
    values, constants = make()
    maps, offset, weight, bias, mask = (v for v in values if v is not None)
    offset[0, 0, 3, 4] = float("nan")
    offset[0, 3, 2, 2] = float("inf")
    output = deform_conv2d(maps, offset, weight, bias, mask=mask, **constants)
    missing = output.isnan().any(dim=1)
    assert missing.nonzero().tolist() == [[0, 3, 4]]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_new_layer_is_the_plain_convolution(modulated: bool, stride: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 6, 3, stride, padding=2, dilation=2, groups=2)
    layer = DeformConv2d.from_conv(plain, modulated=modulated)
    maps = torch.randn(2, 8, 13, 10)
    torch.testing.assert_close(layer(maps), plain(maps), atol=1e-5, rtol=1e-5)
    assert layer.offset_weight.shape[0] == (27 if modulated else 18)
    layer(maps).square().sum().backward()
    assert layer.offset_bias.grad is not None
    assert layer.offset_bias.grad.abs().min() > 0


def test_a_plain_networks_weights_fit_and_keep_their_output() -> None:
    torch.manual_seed(0)
    plain = resnet18(weights=None).eval()
    deformable = copy.deepcopy(plain)
    names = deform_stages(deformable)
    assert names == [f"layer{s}.{b}.conv{c}" for s in (2, 3, 4) for b in (0, 1) for c in (1, 2)]
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {name.rsplit(".", 1)[1] for name in missing} == {"offset_weight", "offset_bias"}
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(deformable(images), plain(images), atol=1e-4, rtol=1e-4)


def test_what_follows_may_change_the_output_in_place() -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(4, 4, 3, padding=1)
    images = torch.randn(2, 4, 6, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(functional.relu(layer(images)).square().sum(), images)
    changed = nn.Sequential(layer, nn.ReLU(inplace=True))(images)
    (found,) = torch.autograd.grad(changed.square().sum(), images)
    torch.testing.assert_close(found, expected)


def test_a_resnet_50_has_thirteen_such_convolutions() -> None:
    with torch.device("meta"):
        assert len(deform_stages(resnet50(weights=None))) == 13


def test_dilated_keeps_sizes_and_weights() -> None:
    plain = resnet18(weights=None).eval()
    dilated = copy.deepcopy(plain)
    assert len(deform_stages(dilated, "dilated")) == 12
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert dilated(images).shape == plain(images).shape
    assert not any(isinstance(part, DeformConv2d) for part in dilated.modules())
    convolution = dilated.get_submodule("layer2.0.conv1")
    assert (convolution.stride, convolution.dilation) == ((2, 2), (2, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda: DeformConv2d(4, 4, 3, padding="same"),  # type: ignore[arg-type]
        lambda: DeformConv2d(4, 4, 3, offset_groups=3),
        lambda: DeformConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        lambda: deform_stages(resnet18(weights=None), "bent"),
        lambda: DeformRoIAlign(4, 7, sampling_ratio=0),
    ],
)
def test_what_cannot_be_done_is_refused(call: Any) -> None:
    with pytest.raises(UsageError):
        call()


def test_autocast_differs_by_its_rounding_only() -> None:
    values, constants = make(channels=64, reach=1.0, size=(16, 12))
    exact = run(deform_conv2d, values, constants)
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(deform_conv2d, values, constants)
    assert rough[0].dtype == torch.bfloat16
    for mine, other in zip(rough, exact, strict=True):
        error = (mine.float() - other).norm() / other.norm()
        assert error < 0.015


def exported(
    module: nn.Module, example: tuple[Tensor, ...], dynamic: tuple[Any, ...], path: Path
) -> Callable[..., Tensor]:
    """Export by torch's own exporter and return a function that ONNX Runtime computes."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(
        module, example, path, dynamo=True, opset_version=19, dynamic_shapes=dynamic, verbose=False
    )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def compute(*values: Tensor) -> Tensor:
        feeds = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return compute


@pytest.mark.parametrize("modulated", [False, True])
def test_onnx_gives_equal_outputs_for_any_size(tmp_path: Path, modulated: bool) -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, 3, 2, 1, modulated=modulated).eval()
    nn.init.normal_(layer.offset_weight, std=0.3)
    dynamic = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    compute = exported(layer, (torch.randn(1, 4, 12, 14),), dynamic, tmp_path / "layer.onnx")
    for size in ((12, 14), (9, 21)):
        maps = torch.randn(1, 4, *size)
        torch.testing.assert_close(compute(maps), layer(maps).detach(), atol=1e-4, rtol=1e-4)


def test_elsewhere_than_on_the_cpu_torchvisions_operators_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Tensor]:
        real = getattr(ops, name)

        def call(*given: Any) -> Tensor:
            calls.append(name)
            found: Tensor = real(*given)
            return found

        return call

    for name in ("deform_conv2d", "roi_align"):
        monkeypatch.setattr(ops, name, counted(name))
    # The meta device has shapes and no values: what runs on CUDA, without one.
    with torch.device("meta"):
        layer = DeformConv2d(4, 6, 3, padding=1)
        assert layer(torch.empty(2, 4, 9, 7)).shape == (2, 6, 9, 7)
        pooled = roi_align(torch.empty(1, 4, 9, 7), torch.empty(3, 5), (2, 2), 1.0, 2, True)
    assert pooled.shape == (3, 4, 2, 2)
    assert calls == ["deform_conv2d", "roi_align"]
    DeformConv2d(4, 6, 3, padding=1)(torch.rand(2, 4, 9, 7))
    roi_align(torch.rand(1, 4, 9, 7), torch.tensor([[0.0, 1, 1, 4, 4]]), (2, 2), 1.0, 2, True)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_gives_equal_outputs() -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, 3, padding=1).eval()
    nn.init.normal_(layer.offset_weight, std=0.3)
    traced = torch.jit.trace(layer, torch.randn(1, 4, 12, 14))
    maps = torch.randn(2, 4, 9, 21)
    torch.testing.assert_close(traced(maps), layer(maps), atol=1e-4, rtol=1e-4)


BOXES = [
    torch.tensor([[3.0, 2.0, 40.0, 25.0], [-30.0, -12.0, 9.5, 70.0], [10.0, 10.0, 10.2, 10.4]]),
    torch.tensor([[0.0, 0.0, 64.0, 40.0]]),
    torch.zeros(0, 4),
]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_a_new_pooling_is_roi_align(aligned: bool, ratio: int) -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 5, 10, 16)
    ours = DeformRoIAlign(5, (7, 3), 0.25, ratio, aligned)
    theirs = ops.RoIAlign((7, 3), 0.25, ratio, aligned)
    mine, other = (maps.clone().requires_grad_() for _ in range(2))
    pooled, expected = ours(mine, BOXES), theirs(other, BOXES)
    assert pooled.shape == (4, 5, 7, 3)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn(pooled.shape)
    pooled.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)
    numbered = ops._utils.convert_boxes_to_roi_format(BOXES)
    torch.testing.assert_close(ours(maps, numbered), pooled)


def test_shifting_all_bins_is_shifting_the_box() -> None:
    torch.manual_seed(0)
    maps = torch.randn(1, 3, 20, 24)
    rois = torch.tensor([[0.0, 6.0, 4.0, 14.0, 16.0]])
    shifts = torch.tensor([0.25, -0.5])[None, :, None, None].expand(1, 2, 7, 7)
    moved = rois + torch.tensor([0.0, -0.5 * 8, 0.25 * 12, -0.5 * 8, 0.25 * 12])
    expected = ops.roi_align(maps, moved, 7, 1.0, 2, True)
    torch.testing.assert_close(
        deform_roi_align(maps, rois, shifts, 1.0, 2, True), expected, atol=1e-5, rtol=1e-5
    )


def test_gradients_of_pooling_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    shifts = (torch.randn(3, 2, 2, 3, dtype=torch.float64) / 10).requires_grad_()
    rois = torch.tensor(
        [[0, 1.1, 0.7, 5.2, 4.9], [1, -2, 1, 3.3, 9], [1, 0, 0, 6, 5]], dtype=torch.float64
    )
    assert torch.autograd.gradcheck(lambda m, s: deform_roi_align(m, rois, s), (maps, shifts))


def test_pooling_learns_where_to_look() -> None:
    torch.manual_seed(0)
    pool = DeformRoIAlign(2, 3)
    maps = torch.randn(1, 2, 16, 16)
    pool(maps, [torch.tensor([[2.0, 2.0, 12.0, 11.0]])]).sum().backward()
    assert pool.fc.weight.grad is not None
    assert pool.fc.weight.grad.abs().sum() > 0


def test_one_pooling_serves_levels_of_any_scale() -> None:
    maps = torch.randn(3, 5, 10, 16)
    ours = DeformRoIAlign(5, 7)(maps, BOXES, 0.25)
    torch.testing.assert_close(ours, ops.roi_align(maps, BOXES, 7, 0.25, 2), atol=1e-5, rtol=1e-5)


def test_onnx_pools_equally_for_any_number_of_boxes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pool = DeformRoIAlign(3, 2, 0.5).eval()
    nn.init.normal_(pool.fc.weight, std=0.3)
    maps = torch.randn(2, 3, 10, 16)
    rois = ops._utils.convert_boxes_to_roi_format(BOXES[:2])
    dynamic = (None, {0: torch.export.Dim.DYNAMIC})
    compute = exported(pool, (maps, rois), dynamic, tmp_path / "pool.onnx")
    for some in (rois, rois[:3], rois.repeat(2, 1)):
        torch.testing.assert_close(
            compute(maps, some), pool(maps, some).detach(), atol=1e-4, rtol=1e-4
        )
