"""RetinaNet for slice stacks: every position of every pyramid level is judged at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvision.models.anchors import AnchorSizes, level_anchors
from medvision.models.backbone import Backbone
from medvision.models.backbones import make_backbone, pyramid_channels
from medvision.models.box_coder import decode_boxes
from medvision.models.config import RetinaNetConfig
from medvision.models.pyramid import FeaturePyramid
from medvision.models.pyramid_config import FINEST_STRIDE

_PRIOR = 0.01


class RawDetections(NamedTuple):
    """What the head says of every anchor. Level by level, then row, column, shape."""

    lesion_logits: Tensor  # [batch, anchors]: is it a lesion, of whatever class
    class_logits: Tensor  # [batch, anchors, classes]: of which class, if it is one
    boxes: Tensor  # [batch, anchors, 4]: x1, y1, x2, y2 in pixels
    anchors: list[Tensor]  # one [anchors of the level, 4] a level
    deltas: Tensor | None = None  # [batch, anchors, 4]: as box_coder has them; None in a mean
    segmentation_logits: Tensor | None = None  # [batch, 1 + classes, row, column]: Retina U-Net's


class RetinaNet(nn.Module):
    """One-stage detector: backbone, pyramid from stride 4 up, one head shared by all levels.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017. One thing differs from the paper:
    "is it a lesion" is one output trained with focal loss on all anchors, and "of which class" a softmax
    trained on the lesions only. With one sigmoid a class, a faint lesion of a rare class is split
    between classes and found by none (docs/decisions/0002-lesion-score-apart-from-class.md).
    """

    def __init__(
        self,
        windows: InnerWindows,
        backbone: Backbone,
        pyramid: FeaturePyramid,
        head: Head,
        anchor_sizes: AnchorSizes,
    ) -> None:
        super().__init__()
        self.windows = windows
        self.backbone = backbone
        self.pyramid = pyramid
        self.head = head
        strides = [stride for stride in backbone.strides if stride >= FINEST_STRIDE]
        self.n_maps = len(strides)
        self.strides = strides[: pyramid.levels]
        for index, shapes in enumerate(anchor_sizes):
            self.register_buffer(f"anchor_sizes_{index}", torch.tensor(shapes), persistent=False)

    def forward(self, images: Tensor) -> RawDetections:
        """Take ``[batch, slice, row, column]`` in 0..1 to raw detections.

        Rows and columns must be multiples of the coarsest stride.
        """
        return self.judge(self.pyramid_levels(self.backbone(self.windows(images))))

    def pyramid_levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Take all the backbone's maps, finest first, to the levels that the head sees."""
        return self.pyramid(maps[-self.n_maps :])

    def judge(self, levels: list[Tensor]) -> RawDetections:
        """Take pyramid levels ``[batch, channel, row, column]``, finest first, to raw detections."""
        outputs = [self.head(features, index) for index, features in enumerate(levels)]
        lesion, classes, deltas = (
            torch.cat(parts, dim=1).float() for parts in zip(*outputs, strict=True)
        )
        anchors = [
            level_anchors((level.shape[-2], level.shape[-1]), stride, self._shapes(index))
            for index, (level, stride) in enumerate(zip(levels, self.strides, strict=True))
        ]
        boxes = decode_boxes(deltas, torch.cat(anchors))
        return RawDetections(lesion[..., 0], classes, boxes, anchors, deltas)

    def _shapes(self, level: int) -> Tensor:
        return self.get_buffer(f"anchor_sizes_{level}")


class InnerWindows(nn.Module):
    """Shows the slices through narrower windows too, as further channels, all scaled to -1..1.

    In a window that holds bone and air, ground glass stands out from lung by a tenth of the range
    (several windows: Yan et al., MVP-Net, MICCAI 2019). A window is a share (low, high) of the
    stack's own.
    """

    def __init__(self, windows: tuple[tuple[float, float], ...]) -> None:
        super().__init__()
        self.windows = windows

    def forward(self, images: Tensor) -> Tensor:
        """Take ``[batch, slice, row, column]`` in 0..1 to ``[batch, slices * (1 + windows), ...]``."""
        views = [images]
        views += [((images - low) / (high - low)).clamp(0, 1) for low, high in self.windows]
        return torch.cat(views, dim=1) * 2 - 1


class Head(nn.Module):
    """Two towers of 3 x 3 convolutions: one for lesion and class, one for the box."""

    def __init__(self, channels: int, depth: int, levels: int, shapes: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.class_tower = Tower(channels, depth, levels)
        self.box_tower = Tower(channels, depth, levels)
        self.lesion = nn.Conv2d(channels, shapes, 3, 1, 1)
        self.category = nn.Conv2d(channels, shapes * classes, 3, 1, 1)
        self.box = nn.Conv2d(channels, shapes * 4, 3, 1, 1)
        for part in (self.lesion, self.category, self.box):
            nn.init.normal_(part.weight, std=0.01)
            _fill_bias(part, 0.0)
        # At the start every anchor is a lesion with 1 percent: a million easy ones then cost little.
        _fill_bias(self.lesion, -math.log((1 - _PRIOR) / _PRIOR))

    def forward(self, features: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Take level ``[batch, channel, row, column]`` to ``[batch, anchors, 1 | classes | 4]``."""
        judged, placed = self.class_tower(features, level), self.box_tower(features, level)
        return (
            _per_anchor(self.lesion(judged), 1),
            _per_anchor(self.category(judged), self.classes),
            _per_anchor(self.box(placed), 4),
        )


class Tower(nn.Module):
    """Convolutions that all levels share, with a batch norm of its own for each level.

    Levels differ in their statistics, so one norm for all would fit none (Tan et al., EfficientDet,
    CVPR 2020). A group norm would take its statistics from the picture, which in training is a crop around a
    lesion and in use a whole slice: what it learnt would not hold there.
    """

    def __init__(self, channels: int, depth: int, levels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False) for _ in range(depth)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth)) for _ in range(levels)
        )

    def forward(self, features: Tensor, level: int) -> Tensor:
        """Take ``[batch, channel, row, column]`` of pyramid level ``level`` to the same shape."""
        norms = self.norms[level].children()
        for convolution, norm in zip(self.convolutions, norms, strict=True):
            features = functional.relu(norm(convolution(features)))
        return features


def _fill_bias(convolution: nn.Conv2d, value: float) -> None:
    if convolution.bias is not None:
        nn.init.constant_(convolution.bias, value)


def _per_anchor(output: Tensor, values: int) -> Tensor:
    """Take ``[batch, shapes * values, row, column]`` to ``[batch, row * column * shapes, values]``."""
    batch, _, rows, columns = output.shape
    split = output.reshape(batch, -1, values, rows, columns)
    return split.permute(0, 3, 4, 1, 2).reshape(batch, -1, values)


DetectorParts = tuple[InnerWindows, Backbone, FeaturePyramid, Head]


def build_parts(config: RetinaNetConfig, n_slices: int, classes: int) -> DetectorParts:
    """Make what a RetinaNet is assembled from, in the order in which it draws its first weights."""
    windows = InnerWindows(config.inner_windows)
    in_channels = n_slices * (1 + len(config.inner_windows))
    backbone = make_backbone(config, in_channels)
    used = pyramid_channels(backbone)
    pyramid = FeaturePyramid(used, config.pyramid_channels, config.pyramid)
    shapes = config.anchors_per_level
    head = Head(config.pyramid_channels, config.head_depth, pyramid.levels, shapes, classes)
    return windows, backbone, pyramid, head


def build_retinanet(config: RetinaNetConfig, n_slices: int, classes: int) -> RetinaNet:
    """Assemble the detector that ``config`` describes; its anchor sizes must have been fitted."""
    return RetinaNet(*build_parts(config, n_slices, classes), config.anchor_sizes)
