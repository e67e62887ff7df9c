"""Deformable convolution: a convolution that learns where to look, as a drop-in for ``nn.Conv2d``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import ops

from medvision.errors import UsageError
from medvision.models.deformable_cpu import deform_conv2d_cpu
from medvision.models.deformable_samples import Geometry

Pair = tuple[int, int]
LAST_THREE_STAGES = ("layer2", "layer3", "layer4")
"""torchvision's names of the ResNet stages that the paper calls conv3 to conv5."""


class DeformConv2d(nn.Conv2d):
    """Convolution whose every tap is moved by an offset that the map itself predicts.

    v1, ``modulated=False``: Dai et al., Deformable Convolutional Networks, ICCV 2017. v2, the default:
    each tap is weighted too (Zhu et al., Deformable ConvNets v2, CVPR 2019). Offsets and weights come
    from a convolution of the same size, stride, padding and dilation that starts at zero. One thing
    differs from v2: the weight is ``2 * sigmoid``, not ``sigmoid``, so that the layer begins as the plain
    convolution and pretrained weights keep their scale. v2 trains that branch (``offset_weight``,
    ``offset_bias``) at a tenth of the other layers' rate (section 3.2), v1 at the same rate as they
    (section 2.3: beta = 1); training takes the tenth for both.

    ``weight`` and ``bias`` are those of ``nn.Conv2d``, under the same names. Groups of
    ``in_channels / offset_groups`` channels have offsets of their own.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        modulated: bool = True,
    ) -> None:
        if isinstance(padding, str):
            raise UsageError(
                f"padding of a deformable convolution must be numbers; got {padding!r}"
            )
        if offset_groups < 1 or in_channels % offset_groups:
            raise UsageError(
                f"offset_groups must divide in_channels; got {offset_groups} and {in_channels}"
            )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.offset_groups = offset_groups
        self.modulated = modulated
        taps = self.weight[0, 0].numel() * offset_groups
        predicted = taps * (3 if modulated else 2)
        # Not an nn.Conv2d of its own: whatever initialises a network's convolutions would end the zeros.
        self.offset_weight = nn.Parameter(torch.zeros(predicted, in_channels, *self.kernel_size))
        self.offset_bias = nn.Parameter(torch.zeros(predicted))
        # The order in which the CPU path multiplies: no copy at each call.
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, modulated: bool = True) -> DeformConv2d:
        """Return a layer that computes what ``conv`` does, and owns its weight and bias."""
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise UsageError("only a convolution with numeric zero padding can be made deformable")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            _pair(conv.kernel_size),
            _pair(conv.stride),
            _pair(conv.padding),
            _pair(conv.dilation),
            conv.groups,
            conv.bias is not None,
            modulated=modulated,
        ).to(conv.weight.device, conv.weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(conv.weight)
            if layer.bias is not None and conv.bias is not None:
                layer.bias.copy_(conv.bias)
        layer.weight.requires_grad_(conv.weight.requires_grad)
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Conv2d's own name)
        """Take ``[batch, in_channels, row, column]`` to the size that ``nn.Conv2d`` would give."""
        offset, mask = self.predict_offsets(input)
        stride, padding, dilation = self._pairs()
        return deform_conv2d(input, offset, self.weight, self.bias, stride, padding, dilation, mask)

    def predict_offsets(self, maps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return offsets ``[batch, offset_groups * taps * 2, row, column]`` in pixels, and the mask.

        Per tap first the row's, then the column's offset. The mask is ``[batch, offset_groups * taps,
        row, column]`` in 0..2, None for v1.
        """
        stride, padding, dilation = self._pairs()
        predicted = functional.conv2d(
            maps, self.offset_weight, self.offset_bias, stride, padding, dilation
        )
        if not self.modulated:
            return predicted, None
        taps = predicted.shape[1] // 3
        offset, mask = predicted.split((2 * taps, taps), dim=1)
        return offset, 2 * mask.sigmoid()

    def _pairs(self) -> tuple[Pair, Pair, Pair]:
        return _pair(self.stride), _pair(self.padding), _pair(self.dilation)


def deform_conv2d(
    maps: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Compute what ``torchvision.ops.deform_conv2d`` does, on the CPU several times faster.

    Elsewhere, and in a graph that is being exported (ONNX has an operator for it), torchvision's own is
    used. Under autocast the CPU path takes map, weight and bias in the lower precision, places in float32.
    """
    if maps.device.type != "cpu" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return ops.deform_conv2d(maps, offset, weight, bias, stride, padding, dilation, mask)
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        maps, weight = maps.to(lower), weight.to(lower)
        bias = None if bias is None else bias.to(lower)
    geometry = Geometry((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    groups = maps.shape[1] // weight.shape[1]
    offset_groups = offset.shape[1] // (2 * geometry.taps)
    if groups == offset_groups == 1:
        return deform_conv2d_cpu(maps, offset, mask, weight, bias, geometry)
    each = math.lcm(groups, offset_groups) // groups
    masks = [None] * offset_groups if mask is None else mask.chunk(offset_groups, dim=1)
    parts = _blocks(
        maps, offset.chunk(offset_groups, dim=1), masks, weight.chunk(groups), each, geometry
    )
    summed = [torch.stack(parts[i : i + each]).sum(0) for i in range(0, len(parts), each)]
    output = torch.cat(summed, dim=1)
    return output if bias is None else output + bias.view(-1, 1, 1)


def _blocks(
    maps: Tensor,
    offsets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    each: int,
    geometry: Geometry,
) -> list[Tensor]:
    """Convolve each run of channels that shares both its group and its offsets; ``each`` a group."""
    blocks = len(weights) * each
    parts = []
    for block, channels in enumerate(maps.chunk(blocks, dim=1)):
        group, shared = block // each, block * len(offsets) // blocks
        weight = weights[group].chunk(each, dim=1)[block % each]
        parts.append(
            deform_conv2d_cpu(channels, offsets[shared], masks[shared], weight, None, geometry)
        )
    return parts


def deform_stages(
    resnet: nn.Module,
    kind: str = "deformable",
    stages: tuple[str, ...] = LAST_THREE_STAGES,
) -> list[str]:
    """Replace the 3 x 3 convolutions of a network's ``stages`` in place; return their names.

    ``kind`` is "deformable" (v2), "deformable-v1", or "dilated": the same weights, two pixels apart, which
    the others must beat. Weights are kept, so a deformable network begins with its former output.
    """
    if kind not in ("deformable", "deformable-v1", "dilated"):
        raise UsageError(f"kind must be deformable, deformable-v1 or dilated; got {kind!r}")
    replaced = []
    for stage in stages:
        for name, part in list(resnet.get_submodule(stage).named_modules(prefix=stage)):
            if type(part) is nn.Conv2d and part.kernel_size == (3, 3):
                resnet.set_submodule(name, _replacement(part, kind))
                replaced.append(name)
    return replaced


def _replacement(conv: nn.Conv2d, kind: str) -> nn.Conv2d:
    if kind == "dilated":
        conv.dilation, conv.padding = (2, 2), (2, 2)
        return conv
    return DeformConv2d.from_conv(conv, modulated=kind == "deformable")


def _pair(value: object) -> Pair:
    if not isinstance(value, tuple) or len(value) != 2:
        raise UsageError(f"kernel size, stride, padding and dilation must be pairs; got {value!r}")
    return value
