"""Anchors: the boxes that a head judges and corrects, fitted to the lesions of the data."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AnchorSizes = tuple[tuple[tuple[float, float], ...], ...]

DEFAULT_BASE = 1.5
"""Without boxes to fit, a level's anchors are 1.5 and 2.1 strides wide, and so on."""


def fit_anchor_sizes(
    sizes: NDArray[np.floating], levels: int, per_level: int, strides: list[int], seed: int = 0
) -> AnchorSizes:
    """Return ``per_level`` anchor shapes (width, height) in pixels for each of ``levels``.

    ``sizes`` is ``[n, 2]`` of box widths and heights. K-means under the distance 1 - IoU of boxes
    laid on one centre (Redmon and Farhadi, YOLO9000, 2017); the clusters go to the levels by area.
    The best of ten starts is kept. With fewer distinct boxes than clusters, shapes repeat.
    """
    clusters = levels * per_level
    if len(sizes) == 0:
        return _default_sizes(levels, per_level, strides)
    generator = np.random.default_rng(seed)
    boxes = np.maximum(np.asarray(sizes, dtype=float), 1.0)
    fits = [_k_means(boxes, clusters, generator) for _ in range(10)]
    _, best = max(fits, key=lambda fit: fit[0])
    ordered = best[np.argsort(best.prod(axis=1))].round(2).reshape(levels, per_level, 2)
    return tuple(tuple((float(w), float(h)) for w, h in level) for level in ordered)


def shape_iou(boxes: NDArray[np.floating], shapes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return ``[n, m]`` IoU of boxes and shapes (width, height) laid on one centre."""
    shared = np.minimum(boxes[:, None], shapes[None]).prod(axis=2)
    return shared / (boxes.prod(axis=1)[:, None] + shapes.prod(axis=1)[None] - shared)


def _k_means(
    boxes: NDArray[np.float64], clusters: int, generator: np.random.Generator
) -> tuple[float, NDArray[np.float64]]:
    centers = boxes[generator.choice(len(boxes), clusters, replace=len(boxes) < clusters)]
    for _ in range(100):
        nearest = shape_iou(boxes, centers).argmax(axis=1)
        moved = np.array(
            [
                np.median(boxes[nearest == k], axis=0) if (nearest == k).any() else centers[k]
                for k in range(clusters)
            ]
        )
        if np.allclose(moved, centers):
            break
        centers = moved
    return float(shape_iou(boxes, centers).max(axis=1).mean()), centers


def _default_sizes(levels: int, per_level: int, strides: list[int]) -> AnchorSizes:
    scales = [DEFAULT_BASE * 2 ** (index / per_level) for index in range(per_level)]
    return tuple(
        tuple((stride * scale, stride * scale) for scale in scales) for stride in strides[:levels]
    )


def level_anchors(size: tuple[int, int], stride: int, shapes: Tensor) -> Tensor:
    """Return ``[rows * columns * shapes, 4]`` boxes ``x1, y1, x2, y2`` in pixels of the image.

    ``size`` is the map's (rows, columns); the cell (i, j) is centred on pixel edge ``(i + 0.5) * stride``.
    The order is row, column, shape: that of the head's outputs.
    """
    rows, columns = size
    device = shapes.device
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * stride
    x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * stride
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    centers = torch.stack((grid_x, grid_y), dim=-1)[:, :, None]  # [rows, columns, 1, 2]
    half = (shapes / 2)[None, None]  # [1, 1, shapes, 2]
    return torch.cat((centers - half, centers + half), dim=-1).reshape(-1, 4)


def per_anchor(output: Tensor, values: int) -> Tensor:
    """Take ``[batch, shapes * values, row, column]`` to ``[batch, row * column * shapes, values]``.

    That is the order of :func:`level_anchors`.
    """
    batch, _, rows, columns = output.shape
    split = output.reshape(batch, -1, values, rows, columns)
    return split.permute(0, 3, 4, 1, 2).reshape(batch, -1, values)
