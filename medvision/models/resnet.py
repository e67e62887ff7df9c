"""ResNet-18 to -152, as torchvision has them, for stacks of slices."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import Tensor, nn

from medvision.models.backbone import Backbone


class ResNetFeatures(Backbone):
    """The ResNet of the paper, without its classifier: one map for each stride, finest first.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, with the stride in the 3 x 3
    convolution as torchvision has it. The maps are those of the stem and the four stages, at strides
    2, 4, 8, 16, 32: for 224 pixels 112, 56, 28, 14, 7. Without ``stem_pooling`` stem and first stage
    share stride 2, and the maps are those of the stages: 112, 56, 28, 14. Names in the state dict
    are torchvision's.
    """

    first_convolution = "conv1"
    first_norm = "bn1"
    stage_names = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, name: str, in_channels: int, stem_pooling: bool = True) -> None:
        super().__init__()
        # A block that starts as the identity trains faster from scratch (Goyal et al. 2017).
        whole: Any = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
        self.conv1 = whole.conv1 if in_channels == 3 else _stem(in_channels, whole.conv1)
        self.bn1: nn.Module = whole.bn1
        self.stem_pooling = nn.MaxPool2d(3, 2, 1) if stem_pooling else nn.Identity()
        self.layer1, self.layer2 = whole.layer1, whole.layer2
        self.layer3, self.layer4 = whole.layer3, whole.layer4
        widths = [whole.fc.in_features >> down for down in (3, 2, 1, 0)]
        self.channels = [self.conv1.out_channels, *widths] if stem_pooling else widths
        self.strides = [2 << index for index in range(len(self.channels))]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Take ``[batch, channel, row, column]`` to the maps, finest first."""
        features = nn.functional.relu(self.bn1(self.conv1(images)))
        maps = [features] if len(self.channels) == 5 else []
        features = self.stem_pooling(features)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
            maps.append(features)
        return maps


def _stem(in_channels: int, colour: nn.Conv2d) -> nn.Conv2d:
    stem = nn.Conv2d(in_channels, colour.out_channels, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem
