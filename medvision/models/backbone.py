"""What a backbone is, and the narrow ResNet of the default."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from medvision.models.pyramid_config import STEM_STRIDE


class Backbone(nn.Module):
    """Takes ``[batch, channel, row, column]`` to maps, finest first; the attributes say what they are.

    Sides must be multiples of the coarsest stride; map i has ``channels[i]`` channels and is ``strides[i]``
    times smaller than the picture. Strides are powers of two. What pretrained weights and changed
    convolutions need to know are the names of parts: ``first_convolution``, ``first_norm`` right after it
    ("": none) and ``stage_names``, from fine to coarse, whose 3 x 3 ``nn.Conv2d`` can be replaced (none:
    they cannot). Norms that can be frozen or become group norms are ``nn.BatchNorm2d``.
    """

    channels: list[int]
    strides: list[int]
    first_convolution: str = ""
    first_norm: str = ""
    stage_names: tuple[str, ...] = ()


class ResNet(Backbone):
    """ResNet of basic blocks with any number of input channels and any width.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016. Without ``stem_pooling`` the
    stages have strides 2, 4, 8, 16 instead of 4, 8, 16, 32: a lesion of 4 pixels then still covers a
    cell of the finest pyramid level after three stages of convolutions.
    """

    first_convolution = "stem.0"
    first_norm = "stem.1"
    stage_names = ("stages.0", "stages.1", "stages.2", "stages.3")

    def __init__(
        self,
        in_channels: int,
        blocks: tuple[int, int, int, int] = (2, 2, 2, 2),
        width: int = 32,
        stem_pooling: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 7, STEM_STRIDE, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        if stem_pooling:
            layers.append(nn.MaxPool2d(3, 2, 1))
        self.stem = nn.Sequential(*layers)
        self.stages = nn.ModuleList()
        channels = width
        for index, count in enumerate(blocks):
            self.stages.append(_stage(channels, width << index, count, 1 if index == 0 else 2))
            channels = width << index
        first = STEM_STRIDE * (2 if stem_pooling else 1)
        self.strides = [first << index for index in range(4)]
        self.channels = [width << index for index in range(4)]
        _initialise(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Take ``[batch, channel, row, column]`` to the four stages' maps, finest first."""
        features = self.stem(images)
        maps = []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        return maps


def build_narrow(name: str, in_channels: int, stem_pooling: bool) -> ResNet:
    """Return the ResNet of its default blocks and width."""
    return ResNet(in_channels, stem_pooling=stem_pooling)


def _stage(channels_in: int, channels_out: int, count: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or channels_in != channels_out:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
            nn.BatchNorm2d(channels_out),
        )
    first = BasicBlock(channels_in, channels_out, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out) for _ in range(count - 1)))


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(part, BasicBlock):
            # A block that starts as the identity trains faster from scratch (Goyal et al. 2017).
            nn.init.zeros_(part.bn2.weight)
