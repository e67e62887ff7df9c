"""Deformable convolution on the CPU: a weighted gather of neighbours, then one matrix product.

torchvision's CPU kernel makes the sampled columns one number at a time; here a row of all channels is
read at once. ``positions = batch * out_rows * out_columns`` and ``samples = positions * taps``:

    rows     [batch * (H + 4) * (W + 4), C]   the map, channels last, zeros around it
    start    [samples]                        the row of each sample's upper left neighbour
    columns  [samples, C]                     sum of its four neighbours by their shares
    output   [positions, out_channels] = columns as [positions, taps * C] @ kernel [taps * C, out_channels]

Two rows of zeros on each side hold every sample's four neighbours once its place is clamped to
-2..H and -2..W: what lies outside then reads zeros and needs no further test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

BORDER = 2
_COLUMNS_BYTES = 2**22
"""Columns made at a time: they should still be in the cache when they are multiplied."""

_COLUMNS_BYTES_FLOAT32 = 2**26
"""The same in float32, where each product first reorders the weights: few large ones are faster."""


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


def deform_conv2d_cpu(
    maps: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Return ``[batch, out_channels, out_rows, out_columns]``, channels last; differentiable once.

    Arguments are as in ``torchvision.ops.deform_conv2d``, for one group and one offset group. Map, weight
    and bias are of one type, which is the output's; places are computed in float32, or float64.
    """
    output: Tensor = _DeformConv.apply(maps, offset, mask, weight, bias, geometry)
    return output


class _DeformConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        maps, offset, mask, weight, bias, geometry = given
        batch, _, out_rows, out_columns = offset.shape
        rows, kernel = padded_rows(maps), _kernel_rows(weight)
        samples = _place(maps, offset, mask, geometry)
        output = maps.new_empty((batch * out_rows * out_columns, len(kernel)))
        for part, columns in _columns(rows, samples, kernel, geometry.taps):
            output[part] = _times(columns, kernel)
        if bias is not None:
            output += bias
        ctx.geometry = geometry
        ctx.save_for_backward(maps, offset, mask, weight)
        return output.view(batch, out_rows, out_columns, len(kernel)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, offset, mask, weight = ctx.saved_tensors
        for_maps, for_offset, for_mask, for_weight, for_bias, _ = ctx.needs_input_grad
        outer = grad.permute(0, 2, 3, 1).reshape(-1, len(weight))
        samples = _place(maps, offset, mask, ctx.geometry)
        rows, kernel = padded_rows(maps), _kernel_rows(weight)
        grads: list[Tensor | None] = [None] * 6
        if for_weight:
            total = torch.zeros_like(kernel, dtype=samples.below.dtype)
            for part, columns in _columns(rows, samples, kernel, ctx.geometry.taps):
                _add_product(total, outer[part].t(), columns)
            grads[3] = _as_weight(total, weight)
        if for_maps or for_offset or for_mask:
            grad_rows = torch.zeros_like(rows) if for_maps else None
            products = _back_to_samples(outer, kernel, rows, samples, len(maps), grad_rows)
            grads[0] = None if grad_rows is None else _unpadded(grad_rows, maps)
            grad_offset, grad_mask = _place_gradients(products, samples, offset)
            grads[1], grads[2] = (
                grad_offset if for_offset else None,
                grad_mask if for_mask else None,
            )
        if for_bias:
            grads[4] = outer.sum(0)
        return tuple(grads)


def _back_to_samples(
    outer: Tensor,
    kernel: Tensor,
    rows: Tensor,
    samples: Samples,
    images: int,
    grad_rows: Tensor | None,
) -> Tensor:
    """Return the columns' gradient times each neighbour, ``[samples, 4]``; add to ``grad_rows``.

    One image at a time, so that the gradient of its columns is never there for all.
    """
    products = torch.empty_like(samples.shares)
    transposed = kernel.t().contiguous()
    for image in range(images):
        part, here, cells = (
            slice(image * len(of) // images, (image + 1) * len(of) // images)
            for of in (outer, products, rows)
        )
        columns = _times(outer[part], transposed)
        values, neighbours = columns.view(-1, rows.shape[1]), samples.neighbours[here]
        products[here] = _products(values, rows, neighbours)
        if grad_rows is not None:
            start = neighbours[:, 0] - cells.start
            _scatter(values, start, samples.shares[here], samples.steps, grad_rows[cells])
    return products


def padded_rows(maps: Tensor) -> Tensor:
    """Return ``[batch * (H + 4) * (W + 4), C]`` of ``maps`` ``[batch, C, H, W]``."""
    batch, channels, height, width = maps.shape
    padded = maps.new_zeros((batch, height + 2 * BORDER, width + 2 * BORDER, channels))
    padded[:, BORDER:-BORDER, BORDER:-BORDER] = maps.permute(0, 2, 3, 1)
    return padded.view(-1, channels)


def _unpadded(rows: Tensor, maps: Tensor) -> Tensor:
    """Undo :func:`padded_rows`."""
    batch, channels, height, width = maps.shape
    padded = rows.view(batch, height + 2 * BORDER, width + 2 * BORDER, channels)
    return padded[:, BORDER:-BORDER, BORDER:-BORDER].permute(0, 3, 1, 2)


def gather(rows: Tensor, neighbours: Tensor, shares: Tensor) -> Tensor:
    """Return ``[samples, C]``: the sum of ``rows[neighbours] * shares``, both ``[samples, n]``."""
    return functional.embedding_bag(neighbours, rows, mode="sum", per_sample_weights=shares)


def _kernel_rows(weight: Tensor) -> Tensor:
    """Return ``[out_channels, taps * C]``: without a copy if the weight is channels last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _as_weight(kernel: Tensor, weight: Tensor) -> Tensor:
    """Undo :func:`_kernel_rows`."""
    out_channels, channels, rows, columns = weight.shape
    parts = kernel.view(out_channels, rows, columns, channels)
    return parts.permute(0, 3, 1, 2).to(weight.dtype)


def _columns(
    rows: Tensor, samples: Samples, kernel: Tensor, taps: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of positions with their columns ``[positions, taps * C]``, as many as fit the cache."""
    positions = len(samples.shares) // taps
    at_once = _COLUMNS_BYTES_FLOAT32 if kernel.dtype == torch.float32 else _COLUMNS_BYTES
    step = max(1, at_once // (kernel.shape[1] * kernel.element_size()))
    for first in range(0, positions, step):
        part = slice(first, min(first + step, positions))
        here = slice(part.start * taps, part.stop * taps)
        columns = gather(rows, samples.neighbours[here], samples.shares[here])
        yield part, columns.view(-1, kernel.shape[1])


def _times(rows: Tensor, kernel: Tensor) -> Tensor:
    """Return ``rows[n, k] @ kernel[m, k].T``, in float32 as a 1 x 1 convolution.

    That is oneDNN's, which takes 0.5 to 0.9 of the time of the matrix product's library on an AMD processor.
    """
    if rows.dtype != torch.float32:
        return rows @ kernel.t()
    image = rows[None, :, None].permute(0, 3, 1, 2)  # [1, k, n, 1], channels last without a copy
    weight = kernel[..., None, None].contiguous(memory_format=torch.channels_last)
    return functional.conv2d(image, weight)[0, ..., 0].t().contiguous()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _place(maps: Tensor, offset: Tensor, mask: Tensor | None, geometry: Geometry) -> Samples:
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


def _products(grad_columns: Tensor, rows: Tensor, neighbours: Tensor) -> Tensor:
    """Return ``[samples, 4]``: the products of each sample's gradient with its neighbours."""
    count = len(neighbours)
    first = torch.arange(0, 4 * count, 4, dtype=neighbours.dtype, device=rows.device)
    sample = torch.arange(count, dtype=neighbours.dtype, device=rows.device).repeat_interleave(4)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_columns, rows, neighbours.flatten(), first, sample, 0
    )
    return products.view(count, 4)


def _scatter(
    values: Tensor, start: Tensor, shares: Tensor, steps: tuple[int, ...], out: Tensor
) -> None:
    """Add to ``out`` what :func:`gather` takes from it: each value to its sample's four neighbours.

    Sorted by first neighbour, the samples that a row gets are one bag for each corner.
    """
    order = start.argsort()
    counts = torch.bincount(start, minlength=len(out))
    first = (counts.cumsum(0) - counts).to(start.dtype)
    shares, order = shares[order].t().contiguous(), order.to(start.dtype)
    for share, step in zip(shares, steps, strict=True):
        bags = first[: len(out) - step]
        out[step:] += functional.embedding_bag(
            order, values, bags, mode="sum", per_sample_weights=share
        )


def _place_gradients(
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
