"""Boxes as corrections of anchors, as in Faster R-CNN (Ren et al., NeurIPS 2015, equation 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGEST_GROWTH = math.log(16.0)


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Return boxes x1, y1, x2, y2 from ``deltas`` (dx, dy, dw, dh) and ``anchors``, both ``[..., 4]``.

    The centre moves by dx, dy anchor sizes; the size grows by exp(dw), exp(dh), at most 16 times.
    """
    size = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(max=_LARGEST_GROWTH).exp() / 2
    return torch.cat((center - half, center + half), dim=-1)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the deltas that :func:`decode_boxes` turns back into ``boxes``."""
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    anchor_center = (anchors[..., :2] + anchors[..., 2:]) / 2
    size = boxes[..., 2:] - boxes[..., :2]
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    return torch.cat(((center - anchor_center) / anchor_size, (size / anchor_size).log()), dim=-1)
