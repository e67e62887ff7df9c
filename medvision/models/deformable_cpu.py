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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from medvision.models.deformable_samples import BORDER, Geometry, Samples, place, place_gradients

_COLUMNS_BYTES = 2**22
"""Columns made at a time: they should still be in the cache when they are multiplied."""

_COLUMNS_BYTES_FLOAT32 = 2**26
"""The same in float32, where each product first reorders the weights: few large ones are faster."""


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
    batch, _, out_rows, out_columns = offset.shape
    output: Tensor = _DeformConv.apply(maps, offset, mask, weight, bias, geometry)
    # Outside of the function: no view that one returns may be changed in place, as a ReLU may want to.
    return output.view(batch, out_rows, out_columns, len(weight)).permute(0, 3, 1, 2)


class _DeformConv(torch.autograd.Function):
    """Its output is ``[positions, out_channels]``."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        maps, offset, mask, weight, bias, geometry = given
        rows, kernel = padded_rows(maps), _kernel_rows(weight)
        samples = place(maps, offset, mask, geometry)
        output = maps.new_empty((len(samples.shares) // geometry.taps, len(kernel)))
        for part, columns in _columns(rows, samples, kernel, geometry.taps):
            output[part] = _times(columns, kernel)
        if bias is not None:
            output += bias
        ctx.geometry = geometry
        ctx.save_for_backward(maps, offset, mask, weight)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, offset, mask, weight = ctx.saved_tensors
        for_maps, for_offset, for_mask, for_weight, for_bias, _ = ctx.needs_input_grad
        outer = grad.contiguous()
        samples = place(maps, offset, mask, ctx.geometry)
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
            grad_offset, grad_mask = place_gradients(products, samples, offset)
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
    """Yield slices of positions with their columns ``[positions, taps * C]``, as many at a time as are fast."""
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
