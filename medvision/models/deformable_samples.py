"""Where a deformable convolution reads: four neighbours of each sample, and what each counts.

The rows are those of ``padded_rows`` in :mod:`medvision.models.deformable_cpu`: two rows of zeros on each side
hold every sample's four neighbours once its place is clamped to -2..H and -2..W.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BORDER = 2


class Geometry(NamedTuple):
    """The constants of a convolution; pairs are (row, column)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        """Return the number of positions of the kernel."""
        return self.kernel[0] * self.kernel[1]


class Samples(NamedTuple):
    """Where the samples lie on the padded rows; their order is batch, row, column, tap."""

    below: Tensor  # [samples] share of the lower neighbours, 0..1
    right: Tensor  # [samples] share of the right-hand neighbours, 0..1
    mask: Tensor | None  # [samples] factor of the whole sample
    neighbours: Tensor  # [samples, 4] rows: upper left, upper right, lower left, lower right
    shares: Tensor  # [samples, 4] what each counts, the mask included; in the map's type
    steps: tuple[int, int, int, int]  # rows between the first neighbour and each


def place(maps: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry) -> Samples:
    """Find where the samples lie; what is not a number stays so in the shares, and in the output."""
    height, width = maps.shape[2:]
    batch, _, out_rows, out_columns = offset.shape
    accurate = torch.float64 if maps.dtype == torch.float64 else torch.float32
    shifts = offset.view(batch, geometry.taps, 2, out_rows, out_columns).permute(0, 3, 4, 1, 2)
    rows, columns = _taps((out_rows, out_columns), geometry, offset.device, accurate)
    y = (shifts[..., 0] + rows).clamp_(-BORDER, height)
    x = (shifts[..., 1] + columns).clamp_(-BORDER, width)
    low_y, low_x = y.floor(), x.floor()
    below, right = y.sub_(low_y), x.sub_(low_x)
    line = width + 2 * BORDER
    first = torch.arange(batch, device=maps.device, dtype=torch.int32) * (height + 2 * BORDER)
    start = low_y.nan_to_num_(-BORDER).int()
    start += (first + BORDER).view(-1, 1, 1, 1)
    start *= line
    start += low_x.nan_to_num_(-BORDER).int()
    start += BORDER
    mask = None if mask is None else mask.permute(0, 2, 3, 1).to(accurate).flatten()
    below, right, steps = below.flatten(), right.flatten(), (0, 1, line, line + 1)
    shares = _shares(below, right, mask).to(maps.dtype)
    return Samples(below, right, mask, _neighbours(start.flatten(), steps), shares, steps)


def _taps(
    size: tuple[int, int], geometry: Geometry, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the regular places of the taps: rows ``[rows, 1, taps]``, columns ``[columns, taps]``."""
    places = []
    for axis in (0, 1):
        at = torch.arange(size[axis], device=device, dtype=dtype) * geometry.stride[axis]
        tap = torch.arange(geometry.kernel[axis], device=device, dtype=dtype)
        places.append((at - geometry.padding[axis])[:, None] + tap * geometry.dilation[axis])
    rows = places[0].repeat_interleave(geometry.kernel[1], dim=1)[:, None]
    return rows, places[1].repeat(1, geometry.kernel[0])


def _neighbours(start: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Return ``[samples, 4]`` rows: upper left, upper right, lower left, lower right."""
    neighbours = start.new_empty((len(start), len(steps)))
    for corner, step in enumerate(steps):
        torch.add(start, step, out=neighbours[:, corner])
    return neighbours


def _shares(below: Tensor, right: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``[samples, 4]`` weights of the neighbours, in their order, times the mask."""
    lower = below if mask is None else below * mask
    upper = 1 - below if mask is None else mask - lower
    shares = right.new_empty((len(right), 4))
    for corner, part in ((0, upper), (2, lower)):
        torch.mul(part, right, out=shares[:, corner + 1])
        torch.sub(part, shares[:, corner + 1], out=shares[:, corner])
    return shares


def place_gradients(
    products: Tensor, samples: Samples, offset: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of offset and mask from the products with the four neighbours."""
    below, right, mask = samples[:3]
    batch, _, rows, columns = offset.shape
    taps = offset.shape[1] // 2
    products = products.to(below.dtype)
    upper, lower = products[:, :2], products[:, 2:]
    left_right = torch.lerp(products[:, 0::2], products[:, 1::2], right[:, None])
    by_row = left_right[:, 1] - left_right[:, 0]
    by_column = torch.lerp(upper[:, 1] - upper[:, 0], lower[:, 1] - lower[:, 0], below)
    places = torch.stack((by_row, by_column), dim=1)
    grad_mask = None
    if mask is not None:
        value = torch.lerp(left_right[:, 0], left_right[:, 1], below)
        grad_mask = value.view(batch, rows, columns, taps).permute(0, 3, 1, 2).to(offset.dtype)
        places = places * mask[:, None]
    grad_offset = places.view(batch, rows, columns, 2 * taps).permute(0, 3, 1, 2)
    return grad_offset.to(offset.dtype), grad_mask
