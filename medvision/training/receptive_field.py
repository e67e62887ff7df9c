"""Receptive field: how far apart the pixels may lie that one position of a map can depend on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from medvision.models.norms import FrozenBatchNorm2d

FIRST_WIDTH = 512
LARGEST_WIDTH = 4096
_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)


def receptive_fields(
    network: nn.Module,
    maps_of: str,
    in_channels: int,
    size_multiple: int,
    largest: int = LARGEST_WIDTH,
) -> list[int]:
    """Return the theoretical receptive field in pixels, along columns, of each map of a part of a network.

    ``maps_of`` is the name of the part; it gives one ``[batch, channel, row, column]`` map or a list of
    them. Widths of images are tried up to ``largest``, which is returned where a field is as
    wide (squeeze and excitation sees all of an image). It is measured, for any architecture: with all
    weights positive and without norms nothing can cancel, so the gradient of the middle position is
    positive wherever a pixel counts. The image is few rows high, as square kernels see as far along rows.
    Convolutions whose weights start at zero (offsets of deformable ones) stay as they are.
    Araujo, Norris and Sim, Computing Receptive Fields of Convolutional Neural Networks, Distill 2019.
    """
    network = _without_cancellation(network)
    part = network.get_submodule(maps_of)
    width = min(FIRST_WIDTH, largest)
    while True:
        width += -width % size_multiple
        fields, whole = _measure(network, part, in_channels, (2 * size_multiple, width))
        if not whole or width >= largest:
            return fields
        width = min(2 * width, largest)


def _without_cancellation(network: nn.Module) -> nn.Module:
    """Return a copy in float64 whose outputs rise with every pixel that they depend on."""
    network = copy.deepcopy(network).cpu().double().eval()
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _NORMS):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.MaxPool2d):
                # The maximum has the gradient of one pixel only; the mean that of all.
                setattr(module, name, _mean_like(child))
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.ndim < 2:
                # A bias shifts; what scales, such as a block's own factor, must not cut its block off.
                value.fill_(0.0 if name.endswith("bias") else 1.0)
            elif value.any():
                # The mean of the inputs: values neither grow nor vanish with depth.
                value.fill_(1 / value[0].numel())
    return network


def _mean_like(pool: nn.MaxPool2d) -> nn.AvgPool2d:
    return nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def _measure(
    network: nn.Module, part: nn.Module, in_channels: int, size: tuple[int, int]
) -> tuple[list[int], bool]:
    """Return the fields on images of ``size``, and whether one reaches an edge and so may be wider."""
    # Above the middle of the window: the activations of narrower windows stay positive there.
    images = torch.full((1, in_channels, *size), 0.75, dtype=torch.float64, requires_grad=True)
    maps = _caught(part, lambda: network(images))
    fields, whole = [], False
    for values in maps:
        middle = values[..., values.shape[-1] // 2].sum()
        (gradient,) = torch.autograd.grad(middle, images, retain_graph=True)
        columns = gradient.abs().sum(dim=(0, 1, 2)).nonzero()[:, 0]
        first, last = int(columns[0]), int(columns[-1])
        fields.append(last - first + 1)
        whole |= first == 0 or last == size[1] - 1
    return fields, whole


class _Caught(Exception):  # noqa: N818  (no fault: it only ends a call early)
    pass


def _caught(part: nn.Module, call: Callable[[], object]) -> list[Tensor]:
    """Return what ``part`` gives during a call; what comes after it is not computed."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, inputs: object, output: Tensor | list[Tensor]) -> None:
        caught[:] = [output] if isinstance(output, Tensor) else list(output)
        raise _Caught

    handle = part.register_forward_hook(catch)
    with suppress(_Caught):
        call()
    handle.remove()
    return caught
