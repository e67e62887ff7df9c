"""Feature pyramid: fine maps that know what the coarse ones saw."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class FeaturePyramid(nn.Module):
    """Lateral 1 x 1 convolutions, nearest-neighbour top-down path, sum, 3 x 3 smoothing.

    Lin et al., Feature Pyramid Networks for Object Detection, CVPR 2017. One output level an input
    map, all with ``channels`` channels, finest first.
    """

    def __init__(self, in_channels: list[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, channels, 1) for count in in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1) for _ in in_channels)
        for part in self.modules():
            if isinstance(part, nn.Conv2d) and part.bias is not None:
                nn.init.kaiming_uniform_(part.weight, a=1)
                nn.init.zeros_(part.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Take backbone maps ``[batch, C_i, row, column]``, finest first, to pyramid levels."""
        merged = [lateral(features) for lateral, features in zip(self.lateral, maps, strict=True)]
        for index in range(len(merged) - 2, -1, -1):
            size = merged[index].shape[-2:]
            merged[index] = merged[index] + functional.interpolate(merged[index + 1], size=size)
        return [smooth(features) for smooth, features in zip(self.smooth, merged, strict=True)]
