"""Deformable RoI pooling: RoIAlign whose bins move to where the object's parts are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision import ops

from medvision.errors import UsageError
from medvision.models.deformable_cpu import gather, padded_rows
from medvision.models.deformable_samples import BORDER


class DeformRoIAlign(nn.Module):
    """RoIAlign in two steps: pool, let a fully connected layer move each bin, pool again.

    Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.2, with RoIAlign's bilinear
    samples (He et al., Mask R-CNN, ICCV 2017) in both steps. The layer says shifts in shares of the box's
    height and width, times ``gamma`` (the paper's 0.1). It starts at zero: the module begins as RoIAlign.
    The paper trains that layer, ``fc``, at a hundredth of the other layers' rate (section 2.3: beta).
    ``channels`` are those of the feature maps; the rest is as in ``torchvision.ops.RoIAlign``, but
    ``sampling_ratio`` is at least 1.
    """

    def __init__(
        self,
        channels: int,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 2,
        aligned: bool = False,
        *,
        gamma: float = 0.1,
    ) -> None:
        super().__init__()
        if sampling_ratio < 1:
            raise UsageError(f"sampling_ratio must be at least 1; got {sampling_ratio}")
        self.output_size = (
            (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        )
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.gamma = gamma
        bins = self.output_size[0] * self.output_size[1]
        self.fc = nn.Linear(channels * bins, 2 * bins)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(
        self, features: Tensor, boxes: Tensor | list[Tensor], spatial_scale: float | None = None
    ) -> Tensor:
        """Take maps ``[batch, channels, row, column]`` to ``[boxes, channels, *output_size]``.

        ``boxes`` are x1, y1, x2, y2 in the image's pixels: a ``[n, 4]`` an image, or one ``[n, 5]`` with the
        image's number first. ``spatial_scale`` replaces the module's: with it, one module serves all levels
        of a pyramid.
        """
        scale = self.spatial_scale if spatial_scale is None else spatial_scale
        rois = boxes if isinstance(boxes, Tensor) else _numbered(boxes)
        pooled = roi_align(
            features,
            rois,
            self.output_size,  # type: ignore[arg-type]
            scale,
            self.sampling_ratio,
            self.aligned,
        )
        shifts = self.gamma * self.fc(pooled.flatten(1)).view(-1, 2, *self.output_size)
        return deform_roi_align(features, rois, shifts, scale, self.sampling_ratio, self.aligned)


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> Tensor:
    """Compute what ``torchvision.ops.roi_align`` does, on the CPU by the faster gather.

    ``rois`` is ``[n, 5]``. Elsewhere, and in a graph that is being exported, torchvision's own is used.
    """
    if features.device.type != "cpu" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return ops.roi_align(features, rois, output_size, spatial_scale, sampling_ratio, aligned)
    unmoved = rois.new_zeros((len(rois), 2, *output_size))
    return deform_roi_align(features, rois, unmoved, spatial_scale, sampling_ratio, aligned)


def deform_roi_align(
    features: Tensor,
    rois: Tensor,
    shifts: Tensor,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> Tensor:
    """Return RoIAlign's ``[n, C, rows, columns]`` with each bin moved by ``shifts`` ``[n, 2, rows, columns]``.

    Shifts are row first, then column, in shares of the box's height and width. ``rois`` is ``[n, 5]``.
    Gradients go to ``features`` and ``shifts``, not to the boxes.
    """
    height, width = features.shape[2:]
    y, x = _sample_places(rois, shifts, spatial_scale, sampling_ratio, aligned)
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    # Within a pixel of the map its edge is repeated: that is RoIAlign, other than in a convolution.
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    low_y, low_x = y.detach().floor(), x.detach().floor()
    below, right = y - low_y, x - low_x
    weight = inside.to(y.dtype) / sampling_ratio**2
    shares = torch.stack(
        (
            weight * (1 - below) * (1 - right),
            weight * (1 - below) * right,
            weight * below * (1 - right),
            weight * below * right,
        ),
        dim=-1,
    )
    line = width + 2 * BORDER
    first = rois[:, 0].long().view(-1, 1, 1, 1) * (height + 2 * BORDER)
    start = (first + low_y.nan_to_num(0).long() + BORDER) * line
    start = start + low_x.nan_to_num(0).long() + BORDER
    # No constants here, nor lengths: in a traced graph they would be those of the example.
    neighbours = torch.stack((start, start + 1, start + line, start + line + 1), dim=-1)
    rows = padded_rows(features.to(y.dtype))
    pooled = _gather(rows, neighbours.flatten(0, 2).flatten(1), shares.flatten(0, 2).flatten(1))
    pooled = pooled.view(rois.shape[0], shifts.shape[2], shifts.shape[3], features.shape[1])
    return pooled.permute(0, 3, 1, 2).to(features.dtype)


def _gather(rows: Tensor, neighbours: Tensor, shares: Tensor) -> Tensor:
    if not torch.compiler.is_exporting():
        return gather(rows, neighbours, shares)
    # Exported as it is, it becomes a loop over all bins.
    return torch.bmm(shares[:, None], rows[neighbours])[:, 0]


def _sample_places(
    rois: Tensor, shifts: Tensor, scale: float, ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Return y and x of the samples ``[n, rows, columns, ratio * ratio]``, in the map's pixel centres."""
    accurate = torch.float64 if shifts.dtype == torch.float64 else torch.float32
    corners = rois[:, 1:].to(accurate) * scale - (0.5 if aligned else 0.0)
    size = corners[:, 2:] - corners[:, :2]
    if not aligned:
        size = size.clamp(min=1)
    within = (torch.arange(ratio, device=rois.device, dtype=accurate) + 0.5) / ratio
    places = []
    for axis, side in ((1, shifts.shape[2]), (0, shifts.shape[3])):
        bins = torch.arange(side, device=rois.device, dtype=accurate)
        share = (bins[:, None] + within) / side  # [bins, ratio]
        places.append(corners[:, axis, None, None] + share * size[:, axis, None, None])
    moved = shifts.to(accurate) * size.flip(1)[:, :, None, None]
    y = places[0][:, :, None, :, None] + moved[:, 0, :, :, None, None]
    x = places[1][:, None, :, None, :] + moved[:, 1, :, :, None, None]
    y, x = torch.broadcast_tensors(y, x)
    return y.flatten(3), x.flatten(3)


def _numbered(boxes: list[Tensor]) -> Tensor:
    """Return ``[n, 5]`` of one ``[n, 4]`` an image: the image's number, then the box."""
    numbered = [
        torch.cat((torch.full_like(of_image[:, :1], index), of_image), dim=1)
        for index, of_image in enumerate(boxes)
    ]
    return torch.cat(numbered)
