"""Which pyramid level a region is pooled from, and the pooling itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import roi_align

from medvision.models.deformable_roi import DeformRoIAlign

PAPER_RULE = (4, 224.0)
"""k0 and the canonical size of the feature pyramid paper: an ImageNet picture is judged on P4."""

_LEAST_CELLS = 2
"""A canonical region covers at least so many cells of its level along a side, where one is that fine:
over fewer, all bins would be interpolated from the same four values."""


def fit_level_rule(sizes: NDArray[np.floating], strides: Sequence[int]) -> tuple[int, float]:
    """Return k0 and the canonical size, in pixels, that spread the boxes best over the levels.

    ``sizes`` is ``[n, 2]`` of box widths and heights, ``strides`` those of the levels, finest first. The
    canonical size is the median of sqrt(width x height). k0 is the level that gives the most even
    counts (highest entropy), the finest of equals, among those on which a canonical region covers
    two cells. Without boxes: the paper's 4 and 224.
    """
    if len(sizes) == 0:
        return PAPER_RULE
    sides = np.sqrt(np.asarray(sizes, dtype=float).prod(axis=1))
    canonical = max(round(float(np.median(sides)), 2), 0.01)
    levels = level_numbers(strides)
    fine_enough = [k for k in levels if _LEAST_CELLS * 2**k <= canonical] or levels[:1]
    return max(fine_enough, key=lambda k0: (_spread(sides, k0, canonical, levels), -k0)), canonical


def level_numbers(strides: Sequence[int]) -> list[int]:
    """Return k of each level, whose stride is 2^k."""
    return [round(math.log2(stride)) for stride in strides]


def _spread(sides: NDArray[np.float64], k0: int, canonical: float, levels: list[int]) -> float:
    """Return the entropy of the share of boxes on each level, to nine places."""
    chosen = np.clip(np.floor(k0 + np.log2(sides / canonical) + 1e-6), levels[0], levels[-1])
    shares = np.unique(chosen, return_counts=True)[1] / len(chosen)
    return round(float(-(shares * np.log2(shares)).sum()), 9)


def roi_levels(boxes: Tensor, k0: int, canonical_size: float, levels: Sequence[int]) -> Tensor:
    """Return for each of ``boxes`` ``[n, 4]`` the index into ``levels``, 0 the finest.

    ``floor(k0 + log2(sqrt(width x height) / canonical_size))``, kept among the levels there are: Lin et al.,
    Feature Pyramid Networks, CVPR 2017, equation 1.
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    # The small addend keeps a region of exactly the canonical size on its level, whatever the rounding.
    k = torch.floor(k0 + torch.log2(side / canonical_size) + 1e-6)
    return (k.clamp(levels[0], levels[-1]) - levels[0]).long()


class RoIAlign(nn.Module):
    """Cut regions out of one map by bilinear interpolation: He et al., Mask R-CNN, ICCV 2017.

    Any module with the same call may stand in its place, such as deformable RoI pooling. ``aligned`` puts
    the centre of cell i at ``(i + 0.5) * stride``, where our anchors have it; without it regions are read
    half a cell off, two pixels on P2, as in the first implementations.
    """

    def __init__(self, size: int, sampling_ratio: int = 2, aligned: bool = True) -> None:
        super().__init__()
        self.size = size
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, features: Tensor, rois: Tensor, spatial_scale: float) -> Tensor:
        """Take map ``[batch, channel, row, column]`` and ``rois`` to ``[n, channel, size, size]``.

        ``rois`` is ``[n, 5]``: index into the batch, then x1, y1, x2, y2 in pixels of the image, of which
        the map has ``spatial_scale`` = 1 / stride cells each.
        """
        return roi_align(
            features, rois, self.size, spatial_scale, self.sampling_ratio, self.aligned
        )


POOLINGS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "align": lambda _, size, ratio: RoIAlign(size, ratio),
    "deformable": lambda channels, size, ratio: DeformRoIAlign(
        channels, size, sampling_ratio=ratio, aligned=True
    ),
}
"""Poolings by name, made from channels, bins a side and samples a side; called as :class:`RoIAlign` is."""


class LevelPooling(nn.Module):
    """Pool each region from the one pyramid level that the level rule gives it."""

    def __init__(
        self, strides: Sequence[int], k0: int, canonical_size: float, pool: nn.Module
    ) -> None:
        """Pool by ``pool(features, rois, spatial_scale)``, called as :class:`RoIAlign` is."""
        super().__init__()
        self.strides = list(strides)
        self.levels = level_numbers(strides)
        self.k0 = k0
        self.canonical_size = canonical_size
        self.pool = pool

    def forward(self, maps: list[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Take pyramid ``maps`` and each image's ``[n_i, 4]`` boxes to ``[sum n_i, channel, size, size]``.

        The order is that of the boxes, image by image; float32, whatever autocast made of the maps.
        """
        rois = torch.cat([_with_index(part, index) for index, part in enumerate(boxes)])
        chosen = roi_levels(rois[:, 1:], self.k0, self.canonical_size, self.levels)
        pooled, order = [], []
        for index, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            here = torch.where(chosen == index)[0]
            pooled.append(self.pool(features.float(), rois[here], 1.0 / stride))
            order.append(here)
        return torch.cat(pooled)[torch.cat(order).argsort()]


def _with_index(boxes: Tensor, index: int) -> Tensor:
    return torch.cat((torch.full_like(boxes[:, :1], index), boxes), dim=1)
