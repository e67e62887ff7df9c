"""Norms for small batches: batch norm that no longer counts, and group norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvision.models.pyramid_config import Norm

GROUPS = 32


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with fixed statistics, scale and shift: the same for every batch, and never trained.

    Detection has room for few images in a batch; their statistics would be noise (He et al., Mask
    R-CNN, ICCV 2017). The entries of the state dict are those of ``nn.BatchNorm2d`` without the counter.
    torchvision's class of this name computes in float32 under autocast and is slower there.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, features: Tensor) -> Tensor:
        """Take ``[batch, channel, row, column]`` to the same shape."""
        return functional.batch_norm(
            features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *others: object
    ) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *others)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Frozen batch norm, then ``act``: timm keeps both in one module."""

    def __init__(self, num_features: int, eps: float, act: nn.Module) -> None:
        super().__init__(num_features, eps)
        self.act = act

    def forward(self, features: Tensor) -> Tensor:
        """Take ``[batch, channel, row, column]`` to the same shape."""
        return self.act(super().forward(features))


class GroupNormAct(nn.GroupNorm):
    """Group norm, then ``act``."""

    def __init__(self, num_groups: int, num_channels: int, eps: float, act: nn.Module) -> None:
        super().__init__(num_groups, num_channels, eps)
        self.act = act

    def forward(self, features: Tensor) -> Tensor:
        """Take ``[batch, channel, row, column]`` to the same shape."""
        return self.act(super().forward(features))


def convert_norms(module: nn.Module, norm: Norm) -> nn.Module:
    """Return ``module`` with each ``nn.BatchNorm2d`` in it replaced as ``norm`` says; changes it in place.

    Frozen keeps weights and statistics, so that nothing changes in eval mode. Group norm (Wu and He,
    ECCV 2018) keeps scale and shift only: it takes its statistics from each image, and a network trained
    with batch norm must be trained on after the change.
    """
    if norm == "batch":
        return module
    if isinstance(module, nn.BatchNorm2d):
        return _frozen(module) if norm == "frozen" else _grouped(module)
    for name, child in module.named_children():
        setattr(module, name, convert_norms(child, norm))
    return module


def group_count(channels: int) -> int:
    """Return 32, the count of the paper, or the largest power of two below that divides ``channels``."""
    return math.gcd(GROUPS, channels)


@torch.no_grad()
def _frozen(batch: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    act = _activation(batch)
    channels = batch.num_features
    frozen = (
        FrozenBatchNorm2d(channels, batch.eps)
        if act is None
        else FrozenBatchNormAct2d(channels, batch.eps, act)
    )
    for name, value in batch.state_dict().items():
        if name in ("weight", "bias", "running_mean", "running_var"):
            frozen.get_buffer(name).copy_(value)
    return frozen


@torch.no_grad()
def _grouped(batch: nn.BatchNorm2d) -> nn.GroupNorm:
    act = _activation(batch)
    channels, groups = batch.num_features, group_count(batch.num_features)
    grouped = (
        nn.GroupNorm(groups, channels, batch.eps)
        if act is None
        else GroupNormAct(groups, channels, batch.eps, act)
    )
    if batch.affine:
        grouped.weight.copy_(batch.weight)
        grouped.bias.copy_(batch.bias)
    return grouped


def _activation(batch: nn.BatchNorm2d) -> nn.Module | None:
    """Return what timm's BatchNormAct2d does after the norm; None for a plain batch norm."""
    act = getattr(batch, "act", None)
    if act is None:
        return None
    drop = getattr(batch, "drop", nn.Identity())
    return act if isinstance(drop, nn.Identity) else nn.Sequential(drop, act)
