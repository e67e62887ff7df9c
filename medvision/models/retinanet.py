"""RetinaNet for slice stacks: every position of every pyramid level is judged at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvision.models.anchors import AnchorSizes, level_anchors
from medvision.models.backbone import Backbone
from medvision.models.backbones import make_backbone, pyramid_channels
from medvision.models.box_coder import decode_boxes
from medvision.models.choices import HEADS, find_choice
from medvision.models.config import RetinaNetConfig
from medvision.models.heads import Head
from medvision.models.pyramid import FeaturePyramid
from medvision.models.pyramid_config import FINEST_STRIDE


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


DetectorParts = tuple[InnerWindows, Backbone, FeaturePyramid, Head]


def build_parts(config: RetinaNetConfig, n_slices: int, classes: int) -> DetectorParts:
    """Make what a RetinaNet is assembled from, in the order in which it draws its first weights."""
    windows = InnerWindows(config.inner_windows)
    in_channels = n_slices * (1 + len(config.inner_windows))
    backbone = make_backbone(config, in_channels)
    used = pyramid_channels(backbone)
    pyramid = FeaturePyramid(used, config.pyramid_channels, config.pyramid)
    make_head = find_choice(HEADS, config.head)
    sizes = (config.pyramid_channels, config.head_depth, pyramid.levels)
    head = make_head(*sizes, config.anchors_per_level, classes)
    return windows, backbone, pyramid, head


def build_retinanet(config: RetinaNetConfig, n_slices: int, classes: int) -> RetinaNet:
    """Assemble the detector that ``config`` describes; its anchor sizes must have been fitted."""
    return RetinaNet(*build_parts(config, n_slices, classes), config.anchor_sizes)
