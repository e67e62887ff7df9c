"""Feature pyramid: fine maps that know what the coarse ones saw."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from medvision.models.pyramid_config import PyramidPaths


class FeaturePyramid(nn.Module):
    """Lateral 1 x 1 convolutions, nearest-neighbour top-down path, sum, 3 x 3 smoothing.

    Lin et al., Feature Pyramid Networks for Object Detection, CVPR 2017. One output level an input
    map, all with ``channels`` channels, finest first. ``paths`` other than "full" are the ablations of the
    paper's tables 1 and 2:

    - "top-down-only": every level is the coarsest map enlarged; nothing says where exactly a lesion is.
    - "lateral-only": every level is its own backbone map; fine levels do not know what the coarse ones saw.
    - "finest-only": all paths, but the finest level alone is given out.
    """

    def __init__(self, in_channels: list[int], channels: int, paths: PyramidPaths = "full") -> None:
        super().__init__()
        self.paths = paths
        self.levels = 1 if paths == "finest-only" else len(in_channels)
        used = in_channels[-1:] if paths == "top-down-only" else in_channels
        self.lateral = nn.ModuleList(nn.Conv2d(count, channels, 1) for count in used)
        self.smooth = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(self.levels)
        )
        for part in self.modules():
            if isinstance(part, nn.Conv2d) and part.bias is not None:
                nn.init.kaiming_uniform_(part.weight, a=1)
                nn.init.zeros_(part.bias)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Take backbone maps ``[batch, C_i, row, column]``, finest first, to pyramid levels."""
        used = maps[-len(self.lateral) :]
        merged = [lateral(features) for lateral, features in zip(self.lateral, used, strict=True)]
        if self.paths == "top-down-only":
            merged = [_enlarge(merged[0], features) for features in maps]
        elif self.paths != "lateral-only":
            for index in range(len(merged) - 2, -1, -1):
                merged[index] = merged[index] + _enlarge(merged[index + 1], merged[index])
        given = merged[: self.levels]
        return [smooth(features) for smooth, features in zip(self.smooth, given, strict=True)]


def _enlarge(features: Tensor, to: Tensor) -> Tensor:
    """Repeat the nearest value until ``features`` has the rows and columns of ``to``."""
    return functional.interpolate(features, size=to.shape[-2:])
