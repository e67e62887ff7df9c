"""Retina U-Net: the RetinaNet with a segmentation branch at the top of its pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvision.errors import UsageError
from medvision.models.anchors import AnchorSizes
from medvision.models.backbone import Backbone
from medvision.models.criterion import Criterion, Target
from medvision.models.heads import Head
from medvision.models.mask_head import MaskDetections
from medvision.models.postprocess import select_detections
from medvision.models.pyramid import FeaturePyramid
from medvision.models.retina_unet_config import RetinaUNetConfig
from medvision.models.retinanet import InnerWindows, RawDetections, RetinaNet, build_parts
from medvision.models.segmentation_losses import (
    IGNORED,
    SegmentationTruth,
    added_weights,
    segmentation_losses,
)

_PRIOR = 0.01


class SegmentationBranch(nn.Module):
    """From the finest pyramid level on to finer maps, up to a class for every pixel.

    At each step the map is enlarged, summed with a lateral one of that stride and smoothed, as in the
    pyramid itself. ``sources`` gives for each step (coarse to fine) the channels that its lateral
    map comes with and the stride between that map and the step's: more than 0 for the image itself, 0 for
    a backbone map that already has the step's stride. ``classes`` does not count the background.
    """

    def __init__(
        self, in_channels: int, sources: list[tuple[int, int]], channels: int, classes: int
    ) -> None:
        super().__init__()
        self.entry = nn.Conv2d(in_channels, channels, 1)
        self.lateral = nn.ModuleList(
            _convolution(count, channels, stride) if stride else nn.Conv2d(count, channels, 1)
            for count, stride in sources
        )
        self.smooth = nn.ModuleList(_convolution(channels, channels, 1) for _ in sources)
        self.output = nn.Conv2d(channels, 1 + classes, 1)
        _initialise(self, classes)

    def forward(self, level: Tensor, sources: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return logits ``[batch, 1 + classes, *size]`` from the finest level and each step's source."""
        features = self.entry(level)
        for lateral, smooth, source in zip(self.lateral, self.smooth, sources, strict=True):
            fine = lateral(source)
            features = smooth(functional.interpolate(features, size=fine.shape[-2:]) + fine)
        logits = self.output(features).float()
        return functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _convolution(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


@torch.no_grad()
def _initialise(branch: SegmentationBranch, classes: int) -> None:
    for part in branch.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_uniform_(part.weight, a=1)
            if part.bias is not None:
                part.bias.zero_()
    nn.init.normal_(branch.output.weight, std=0.01)
    # At the start every pixel is background with 99 percent, as nearly all are.
    if branch.output.bias is not None:
        branch.output.bias[0] = math.log(classes * (1 - _PRIOR) / _PRIOR)


class RetinaUNet(RetinaNet):
    """One-stage detector that also says of every pixel which class it belongs to.

    Jaeger et al., Retina U-Net: Embarrassingly Simple Exploitation of Segmentation Supervision for
    Medical Object Detection, ML4H at NeurIPS 2019 (PMLR 116): the top-down path goes on to the levels
    P1 and P0, on which nothing is detected, and masks teach the pyramid what boxes cannot. Two things differ:
    P1 starts from the smoothed P2, so that every kind of pyramid can carry the branch, and by default P0
    is left out: the logits of P1 are enlarged.
    """

    def __init__(
        self,
        windows: InnerWindows,
        backbone: Backbone,
        pyramid: FeaturePyramid,
        head: Head,
        anchor_sizes: AnchorSizes,
        segmentation: SegmentationBranch,
        segmentation_strides: list[int],
    ) -> None:
        super().__init__(windows, backbone, pyramid, head, anchor_sizes)
        self.segmentation = segmentation
        self._sources = [
            _map_of_stride(backbone.strides, stride) for stride in segmentation_strides
        ]

    def forward(self, images: Tensor) -> RawDetections:
        """Take ``[batch, slice, row, column]`` in 0..1 to raw detections with ``segmentation_logits``.

        The logits are ``[batch, 1 + classes, row, column]``, background first, of the images' size.
        """
        seen = self.windows(images)
        maps = self.backbone(seen)
        levels = self.pyramid_levels(maps)
        sources = [seen if index is None else maps[index] for index in self._sources]
        size = (images.shape[-2], images.shape[-1])
        segmented = self.segmentation(levels[0], sources, size)
        return self.judge(levels)._replace(segmentation_logits=segmented)


def _map_of_stride(strides: list[int], stride: int) -> int | None:
    """Return which backbone map has this stride; None: none has, the image itself must do."""
    return strides.index(stride) if stride in strides else None


def build_retina_unet(config: RetinaUNetConfig, n_slices: int, classes: int) -> RetinaUNet:
    """Assemble the detector that ``config`` describes; its anchor sizes must have been fitted.

    From the same seed, the parts that a RetinaNet has start with the same weights.
    """
    windows, backbone, pyramid, head = build_parts(config, n_slices, classes)
    image_channels = n_slices * (1 + len(config.inner_windows))
    strides = [2, 1] if config.segmentation_stride == 1 else [2]
    sources = []
    for stride in strides:
        index = _map_of_stride(backbone.strides, stride)
        sources.append((image_channels, stride) if index is None else (backbone.channels[index], 0))
    branch = SegmentationBranch(
        config.pyramid_channels, sources, config.segmentation_channels, classes
    )
    return RetinaUNet(windows, backbone, pyramid, head, config.anchor_sizes, branch, strides)


class SegmentedTarget(Target, total=False):
    """A target that may hold the class of each pixel too."""

    class_map: Tensor  # [row, column], integer: 0 background, 1.. classes, 255 ignored
    added_weights: Tensor  # [row, column]; for all targets of a batch or none


class RetinaUNetCriterion(nn.Module):
    """The RetinaNet's losses, and that of the segmentation where there are masks."""

    def __init__(self, config: RetinaUNetConfig, class_weights: Tensor) -> None:
        """Take the weights ``[classes]`` of the box's class; the segmentation has none."""
        super().__init__()
        self.config = config
        self.detection = Criterion(config, class_weights)

    def forward(self, raw: RawDetections, targets: Sequence[SegmentedTarget]) -> dict[str, Tensor]:
        """Return the weighted losses; ``segmentation`` is 0 where no target has a ``class_map``.

        In Jaeger et al. it is the mean of cross-entropy and Dice over the batch, as here by default.
        """
        losses = self.detection(raw, targets)
        if raw.segmentation_logits is None:
            raise UsageError("The network must have a segmentation branch; this one has none.")
        class_map = _class_map(raw.segmentation_logits, targets)
        logits, settings = raw.segmentation_logits, self.config.segmentation_loss
        weights = logits.new_ones(logits.shape[1])
        weights[0] = settings.background_weight
        truth = SegmentationTruth(class_map, weights, added_weights(targets))
        parts = segmentation_losses(logits, truth, settings)
        return {**losses, "segmentation": torch.stack(list(parts.values())).sum()}


def _class_map(logits: Tensor, targets: Sequence[SegmentedTarget]) -> Tensor:
    """Return ``[batch, row, column]``; an image without masks is ignored all over."""
    ignored = torch.full(logits.shape[-2:], IGNORED, dtype=torch.uint8, device=logits.device)
    return torch.stack([target.get("class_map", ignored) for target in targets])


@torch.no_grad()
def select_with_masks(
    raw: RawDetections,
    *,
    score_thresh: float,
    nms_thresh: float,
    detections_per_img: int,
    mask_thresh: float = 0.5,
) -> list[MaskDetections]:
    """Keep the boxes that ``select_detections`` keeps, each with its mask cut from the segmentation.

    A result has no ``masks`` if ``raw`` has no segmentation.
    """
    selected = select_detections(
        raw,
        score_thresh=score_thresh,
        nms_thresh=nms_thresh,
        detections_per_img=detections_per_img,
    )
    found: list[MaskDetections] = [{**item} for item in selected]
    if raw.segmentation_logits is not None:
        for item, logits in zip(found, raw.segmentation_logits, strict=True):
            item["masks"] = cut_masks(logits, item["boxes"], mask_thresh)
    return found


def cut_masks(segmentation_logits: Tensor, boxes: Tensor, mask_thresh: float = 0.5) -> Tensor:
    """Return ``[n, row, column]`` bool: in each box the pixels that are lesion rather than background.

    ``segmentation_logits`` is ``[1 + classes, row, column]``, ``boxes`` ``[n, 4]`` x1, y1, x2, y2 in pixels, of
    any detector; a pixel is in a box if its centre is. Of which class the pixel is does not matter:
    the detection's class is decided once for all of it. A mask is empty where the two disagree.
    """
    lesion = 1 - segmentation_logits.softmax(dim=0)[0] >= mask_thresh
    rows, columns = (torch.arange(n, device=boxes.device) + 0.5 for n in lesion.shape)
    x1, y1, x2, y2 = boxes[..., None].unbind(dim=1)  # [n, 1] each
    inside_rows = (rows >= y1) & (rows < y2)
    inside_columns = (columns >= x1) & (columns < x2)
    return inside_rows[:, :, None] & inside_columns[:, None] & lesion
