"""What a U-Net is built of: pairs of convolutions, down-samplings, up-samplings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medvision.models.unet_config import UNetConfig

_GROUPS = 8


def center_crop(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the middle ``size`` rows and columns of ``[..., row, column]``."""
    top, left = (maps.shape[-2] - size[0]) // 2, (maps.shape[-1] - size[1]) // 2
    return maps[..., top : top + size[0], left : left + size[1]]


def convolutions(before: int, after: int, config: UNetConfig) -> nn.Sequential:
    """Return two 3 x 3 convolutions, each with norm and ReLU."""
    layers: list[nn.Module] = []
    edge = 0 if config.padding == "valid" else 1
    for channels in (before, after):
        layers.append(nn.Conv2d(channels, after, 3, 1, edge, bias=config.norm == "none"))
        if config.norm != "none":
            layers.append(_norm(config.norm, after))
        layers.append(nn.ReLU(inplace=True))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            # Unit variance after each ReLU (He et al. 2015), the paper's sqrt(2 / N).
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers)


class InstanceNorm(nn.GroupNorm):
    """Instance norm (Ulyanov et al. 2016) that takes maps of a single pixel too; torch's refuses them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name in the parent class)
        """Take ``[batch, channel, row, column]`` to the same shape."""
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return InstanceNorm(channels)
    return nn.GroupNorm(math.gcd(_GROUPS, channels), channels)


def downsampling(kind: str, channels: int) -> nn.Module:
    """Return what halves rows and columns of ``[batch, channels, row, column]``: max, average or stride."""
    if kind == "max":
        return nn.MaxPool2d(2)
    return nn.AvgPool2d(2) if kind == "average" else nn.Conv2d(channels, channels, 2, 2)


def upsampling(kind: str, before: int, after: int) -> nn.Module:
    """Return what doubles rows and columns and takes ``before`` channels to ``after``.

    ``kind`` is transposed (a 2 x 2 convolution), bilinear or nearest (interpolation and a 1 x 1 one).
    """
    layer: nn.Conv2d | nn.ConvTranspose2d = nn.Conv2d(before, after, 1)
    if kind == "transposed":
        layer = nn.ConvTranspose2d(before, after, 2, 2)
    # Each output pixel sums over the channels alone, and no ReLU follows.
    nn.init.normal_(layer.weight, std=before**-0.5)
    if kind == "transposed":
        return layer
    # A 1 x 1 convolution and interpolation may change places; before it, it costs a quarter.
    return nn.Sequential(layer, nn.Upsample(scale_factor=2, mode=kind))
