"""torchvision's own detectors, to be given the weights of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import resnet18
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

STAGES = ("layer1", "layer2", "layer3", "layer4")


class NoExtraLevels(ExtraFPNBlock):
    """Leaves the pyramid at P2 to P5; torchvision always adds a level, ours has none."""

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        return results, names


def shake(module: nn.Module) -> None:
    """Give every norm statistics, scale and shift of its own, so that a mix-up shows."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1, 0.1)
            nn.init.normal_(part.bias, std=0.1)
            nn.init.normal_(part.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(part.get_buffer("running_var"), 0.5, 1.5)


def resnet18_fpn(ours: Any, channels: int) -> BackboneWithFPN:
    """Return torchvision's ResNet-18 with a pyramid of P2 to P5, with the weights of ``ours``."""
    returned = {name: str(index) for index, name in enumerate(STAGES)}
    theirs = BackboneWithFPN(
        resnet18(weights=None), returned, [64, 128, 256, 512], channels, NoExtraLevels()
    )
    missing, unexpected = theirs.body.load_state_dict(ours.backbone.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    for index in range(4):
        theirs.fpn.inner_blocks[index][0].load_state_dict(ours.pyramid.lateral[index].state_dict())
        theirs.fpn.layer_blocks[index][0].load_state_dict(ours.pyramid.smooth[index].state_dict())
    return theirs.eval()


def seen_by(network: Any, images: Tensor) -> Tensor:
    """Return what ``network`` makes of images in 0..1 before its backbone."""
    with torch.no_grad():
        seen: Tensor = network.windows(images)
    return seen
