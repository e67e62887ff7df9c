"""Mask R-CNN's head: the outline of the lesion in each region, learnt from the findings' masks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

from medvision.models.criterion import Target
from medvision.models.postprocess import Detections
from medvision.models.roi_levels import LevelPooling
from medvision.models.two_stage_config import MaskConfig


class MaskTarget(Target, total=False):
    """A target that may hold the lesions' outlines too, one for each of its boxes."""

    masks: Tensor  # [n, rows, columns] bool, in pixels of the image; empty where it is not known


class MaskDetections(Detections, total=False):
    """The boxes of one slice, by falling score, and their outlines if there is a mask head."""

    masks: Tensor  # [n, rows, columns] bool


class RawMasks(NamedTuple):
    """What the mask head says of the regions it is trained on, and what those are."""

    logits: Tensor  # [regions, 1 or classes, size, size]
    boxes: list[Tensor]  # each image's regions, [n_i, 4]
    matched: list[Tensor]  # the box of the target that each stands for, [n_i]


class MaskHead(nn.Module):
    """Convolutions on a pooled region, then twice its resolution: 14 x 14 to 28 x 28.

    He et al., Mask R-CNN, ICCV 2017, figure 4. With ``classes`` masks a region the second stage's class
    says which is used, so that classes do not compete for pixels; with 1 it is the same for all, which the
    paper finds nearly as good, and which rare classes need.
    """

    def __init__(self, in_channels: int, channels: int, depth: int, classes: int = 1) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * depth
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, 1, 1) for before, after in pairwise(widths)
        )
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.mask = nn.Conv2d(channels, classes, 1)
        for name, value in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(value)
            else:
                nn.init.kaiming_normal_(value, mode="fan_out", nonlinearity="relu")

    def forward(self, pooled: Tensor) -> Tensor:
        """Take ``[n, channel, size, size]`` to logits ``[n, 1 or classes, 2 * size, 2 * size]``."""
        for convolution in self.convolutions:
            pooled = functional.relu(convolution(pooled))
        logits: Tensor = self.mask(functional.relu(self.upsample(pooled)))
        return logits.float()


class MaskBranch(nn.Module):
    """The mask head with the pooling before it: trained on true boxes' regions, used on found ones."""

    def __init__(self, pool: LevelPooling, head: MaskHead, config: MaskConfig) -> None:
        super().__init__()
        self.pool = pool
        self.head = head
        self.config = config

    def forward(
        self,
        maps: list[Tensor],
        regions: Sequence[Tensor],
        matched: Sequence[Tensor],
        targets: Sequence[MaskTarget],
    ) -> RawMasks:
        """Judge each image's first regions that stand for a lesion; see :func:`masks_to_train`."""
        boxes, rows = masks_to_train(regions, matched, targets, self.config.regions_trained)
        return RawMasks(self.head(self.pool(maps, boxes)), boxes, rows)

    def outline(
        self, maps: list[Tensor], found: Sequence[MaskDetections], size: tuple[int, int]
    ) -> None:
        """Add ``masks`` to the boxes found on each image of ``size`` (rows, columns)."""
        boxes = [item["boxes"] for item in found]
        labels = torch.cat([item["class_probabilities"].argmax(dim=1) for item in found])
        probabilities = pick_class(self.head(self.pool(maps, boxes)), labels).sigmoid()
        parts = probabilities.split([len(part) for part in boxes])
        for item, part in zip(found, parts, strict=True):
            item["masks"] = paste_masks(part, item["boxes"], size) >= self.config.mask_thresh


def pick_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``[n, size, size]``: of ``[n, 1 or classes, size, size]`` the one of each label ``[n]``."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(labels), device=labels.device), labels]


def masks_to_train(
    boxes: Sequence[Tensor], matched: Sequence[Tensor], targets: Sequence[MaskTarget], most: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return for each image its first ``most`` regions that stand for a lesion, and for which.

    A lesion whose mask is empty gives none, nor does an image whose target has no ``masks``: a box alone
    says nothing of the outline.
    """
    kept_boxes, kept_matched = [], []
    for part, row, target in zip(boxes, matched, targets, strict=True):
        rows = torch.where(row >= 0)[0]
        if "masks" in target:
            outlined = target["masks"].flatten(1).any(dim=1)
            rows = rows[outlined[row[rows]]][:most]
        else:
            rows = rows[:0]
        kept_boxes.append(part[rows])
        kept_matched.append(row[rows])
    return kept_boxes, kept_matched


@torch.no_grad()
def crop_masks(masks: Tensor, matched: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return ``[n, size, size]`` of 0 and 1: of ``masks[matched]`` what lies in each of ``boxes``.

    A cell is in the mask if the mask, interpolated between pixel centres and averaged over the cell,
    reaches a half.
    """
    rois = torch.cat((matched[:, None].to(boxes), boxes), dim=1)
    shares = roi_align(masks[:, None].to(boxes), rois, size, 1.0, aligned=True)
    return (shares[:, 0] >= 0.5).to(boxes)


def mask_loss(raw: RawMasks, targets: Sequence[MaskTarget]) -> Tensor:
    """Return the mean cross-entropy of the pixels of each region's mask; 0 without any region."""
    if len(raw.logits) == 0:
        return raw.logits.sum()
    size = raw.logits.shape[-1]
    wanted, labels = [], []
    for boxes, matched, target in zip(raw.boxes, raw.matched, targets, strict=True):
        if len(boxes):
            wanted.append(crop_masks(target["masks"], matched, boxes, size))
            labels.append(target["labels"][matched])
    logits = pick_class(raw.logits, torch.cat(labels))
    return functional.binary_cross_entropy_with_logits(logits, torch.cat(wanted))


def paste_masks(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``[n, rows, columns]``: ``[n, size, size]`` probabilities laid into their boxes ``[n, 4]``.

    Each pixel takes the value at its centre, interpolated between the centres of the mask's cells, 0
    outside. The two axes are interpolated apart, as products with ``[pixels, cells]`` weights, so that
    boxes keep their fractions of a pixel: rounded to whole ones a lesion of 4 pixels would move by an eighth.
    """
    rows = _interpolation(boxes[:, 1], boxes[:, 3], size[0], probabilities.shape[-2])
    columns = _interpolation(boxes[:, 0], boxes[:, 2], size[1], probabilities.shape[-1])
    return rows @ probabilities @ columns.transpose(1, 2)


def _interpolation(low: Tensor, high: Tensor, pixels: int, cells: int) -> Tensor:
    """Return ``[n, pixels, cells]``: the weight of each cell between ``low`` and ``high`` at each pixel."""
    centers = torch.arange(pixels, device=low.device, dtype=low.dtype) + 0.5
    extent = (high - low).clamp(min=1e-6)[:, None]
    share = (centers[None] - low[:, None]) / extent  # [n, pixels], 0..1 within the box
    # Beyond the centres of the outermost cells, up to the box's edge, their value holds.
    place = (share * cells - 0.5).clamp(0, cells - 1)
    number = torch.arange(cells, device=low.device, dtype=low.dtype)
    weights = (1 - (place[..., None] - number).abs()).clamp(min=0)
    return weights * ((share >= 0) & (share < 1))[..., None]
