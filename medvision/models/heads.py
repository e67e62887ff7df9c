"""Heads of RetinaNet and Retina U-Net: what all pyramid levels are judged with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn import functional

from medvision.models.anchors import per_anchor

PRIOR = 0.01
"""Share of the anchors that are taken for lesions before anything is learned."""


class Head(nn.Module, ABC):
    """Judges a map of the pyramid: is an anchor a lesion, of which class, and where exactly.

    What is common to all heads: the three outputs. A head says how a map becomes what they look at.
    """

    def add_outputs(self, channels: int, shapes: int, classes: int) -> None:
        """Add the three outputs, as the last of what a head is made of; ``shapes`` anchors are at a place."""
        self.classes = classes
        self.lesion = nn.Conv2d(channels, shapes, 3, 1, 1)
        self.category = nn.Conv2d(channels, shapes * classes, 3, 1, 1)
        self.box = nn.Conv2d(channels, shapes * 4, 3, 1, 1)
        for part in (self.lesion, self.category, self.box):
            nn.init.normal_(part.weight, std=0.01)
            _fill_bias(part, 0.0)
        # At the start every anchor is a lesion with 1 percent: a million easy ones then cost little.
        _fill_bias(self.lesion, -math.log((1 - PRIOR) / PRIOR))

    @abstractmethod
    def look(self, features: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Take pyramid level ``level`` to what lesion and class, and what the box is read from."""

    def forward(self, features: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take level ``[batch, channel, row, column]`` to ``[batch, anchors, 1 | classes | 4]``."""
        judged, placed = self.look(features, level)
        return (
            per_anchor(self.lesion(judged), 1),
            per_anchor(self.category(judged), self.classes),
            per_anchor(self.box(placed), 4),
        )


class SeparateTowers(Head):
    """Two towers of 3 x 3 convolutions: one for lesion and class, one for the box.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4: class and box share no weights.
    """

    def __init__(self, channels: int, depth: int, levels: int, shapes: int, classes: int) -> None:
        super().__init__()
        self.class_tower = Tower(channels, depth, levels)
        self.box_tower = Tower(channels, depth, levels)
        self.add_outputs(channels, shapes, classes)

    def look(self, features: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Return the maps of both towers, ``[batch, channel, row, column]`` each."""
        return self.class_tower(features, level), self.box_tower(features, level)


class SharedTower(Head):
    """One tower of 3 x 3 convolutions for all outputs, half the work of two.

    As the region proposal network has it: Ren et al., Faster R-CNN, NeurIPS 2015, section 3.1.
    """

    def __init__(self, channels: int, depth: int, levels: int, shapes: int, classes: int) -> None:
        super().__init__()
        self.tower = Tower(channels, depth, levels)
        self.add_outputs(channels, shapes, classes)

    def look(self, features: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Return the tower's map ``[batch, channel, row, column]`` for both."""
        seen = self.tower(features, level)
        return seen, seen


class Tower(nn.Module):
    """Convolutions that all levels share, with a batch norm of its own for each level.

    Levels differ in their statistics, so one norm for all would fit none (Tan et al., EfficientDet,
    CVPR 2020). A group norm would take its statistics from the picture, which in training is a crop around a
    lesion and in use a whole slice: what it learnt would not hold there.
    """

    def __init__(self, channels: int, depth: int, levels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False) for _ in range(depth)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth)) for _ in range(levels)
        )

    def forward(self, features: Tensor, level: int) -> Tensor:
        """Take ``[batch, channel, row, column]`` of pyramid level ``level`` to the same shape."""
        norms = self.norms[level].children()
        for convolution, norm in zip(self.convolutions, norms, strict=True):
            features = functional.relu(norm(convolution(features)))
        return features


def _fill_bias(convolution: nn.Conv2d, value: float) -> None:
    if convolution.bias is not None:
        nn.init.constant_(convolution.bias, value)
