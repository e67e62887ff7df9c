"""Heads of the second stage: what a pooled region is judged with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn import functional

_PRIOR_BACKGROUND = 0.9


class RegionHead(nn.Module, ABC):
    """Judges a pooled region: background or which class, and where exactly.

    The box is corrected alike whatever the class: a rare class has too few boxes to learn its own from.
    What is common to all heads: the two outputs. A head says how a region becomes what they look at.
    """

    def add_outputs(self, width: int, classes: int) -> None:
        """Add both outputs, as the last of what a head is made of, for features of ``width``."""
        self.category = nn.Linear(width, 1 + classes)
        self.box = nn.Linear(width, 4)
        nn.init.normal_(self.category.weight, std=0.01)
        nn.init.normal_(self.box.weight, std=0.001)
        nn.init.zeros_(self.category.bias)
        nn.init.zeros_(self.box.bias)
        # Most regions are background: were that to be learnt first, units that see lesions would die of it.
        odds = _PRIOR_BACKGROUND / (1 - _PRIOR_BACKGROUND)
        nn.init.constant_(self.category.bias[:1], math.log(odds * classes))

    @abstractmethod
    def look(self, pooled: Tensor) -> Tensor:
        """Take ``[n, channel, size, size]`` to the features ``[n, width]`` that both outputs read."""

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``[n, channel, size, size]`` to logits ``[n, 1 + classes]`` and deltas ``[n, 4]``."""
        features = self.look(pooled)
        return self.category(features).float(), self.box(features).float()


class LinearHead(RegionHead):
    """Two fully connected layers: Ren et al., NeurIPS 2015; on a pyramid: Lin et al., CVPR 2017."""

    def __init__(self, channels: int, pool_size: int, width: int, classes: int) -> None:
        super().__init__()
        self.fc6 = _linear(channels * pool_size**2, width)
        self.fc7 = _linear(width, width)
        self.add_outputs(width, classes)

    def look(self, pooled: Tensor) -> Tensor:
        """Return ``[n, width]`` of the flattened regions."""
        features = functional.relu(self.fc6(pooled.flatten(start_dim=1)))
        return functional.relu(self.fc7(features))


class ConvolutionHead(RegionHead):
    """Four 3 x 3 convolutions, then one fully connected layer.

    Wu and He, Group Normalization, ECCV 2018, section 4.2, without the norm: what lies where in a region is
    kept for longer.
    """

    def __init__(self, channels: int, pool_size: int, width: int, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(_convolution(channels) for _ in range(4))
        self.fc = _linear(channels * pool_size**2, width)
        self.add_outputs(width, classes)

    def look(self, pooled: Tensor) -> Tensor:
        """Return ``[n, width]`` of the regions, looked at while they are maps still."""
        for convolution in self.convolutions:
            pooled = functional.relu(convolution(pooled))
        return functional.relu(self.fc(pooled.flatten(start_dim=1)))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
    return layer


def _convolution(channels: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, channels, 3, 1, 1)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
