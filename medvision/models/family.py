"""The models by name: how each is built, trained and asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medvision.models.backbones import make_backbone
from medvision.models.criterion import Criterion, Target
from medvision.models.family_config import ModelConfig
from medvision.models.faster_rcnn import FasterRCNN, FasterRCNNCriterion, build_faster_rcnn
from medvision.models.flips import MIRRORED_AXES, detect_with_flips
from medvision.models.mask_head import MaskDetections
from medvision.models.retina_unet import RetinaUNetCriterion, build_retina_unet, select_with_masks
from medvision.models.retinanet import build_retinanet
from medvision.models.timm_backbone import TimmFeatures, check_map_sizes
from medvision.models.unet import UNet, build_unet
from medvision.models.unet_config import UNetConfig
from medvision.models.unet_criterion import SegmentationCriterion
from medvision.models.views import fuse_views, mirror_detections

BUILDERS: dict[str, Callable[[Any, int, int], nn.Module]] = {
    "retinanet": build_retinanet,
    "faster-rcnn": build_faster_rcnn,
    "mask-rcnn": build_faster_rcnn,
    "retina-unet": build_retina_unet,
    "unet": build_unet,
}
CRITERIA: dict[str, Callable[[Any, Tensor], nn.Module]] = {
    "retinanet": Criterion,
    "faster-rcnn": FasterRCNNCriterion,
    "mask-rcnn": FasterRCNNCriterion,
    "retina-unet": RetinaUNetCriterion,
    "unet": SegmentationCriterion,
}
ENCODERS = {"unet": "encoder"}
"""Part of a network that pretrained weights go into, where it is not called backbone."""

OUTPUTS = {
    "retinanet": ("head",),
    "faster-rcnn": ("proposal_head", "box_head"),
    "mask-rcnn": ("proposal_head", "box_head", "mask_branch"),
    "retina-unet": ("head", "segmentation"),
    "unet": ("heads",),
}
"""Parts of a network that give its answers."""

NEED_MASKS = frozenset({"mask-rcnn", "retina-unet", "unet"})
"""Models that are trained from outlines, not from boxes alone."""


def build_model(config: ModelConfig, n_slices: int, classes: int) -> nn.Module:
    """Assemble the network that ``config`` describes; what is fitted to data must have been fitted."""
    return BUILDERS[config.name](config, n_slices, classes)


def check_backbone(config: ModelConfig, n_slices: int) -> None:
    """Refuse a backbone that the rest of the model cannot use; what is fitted to data need not be there.

    Nothing is allocated. UsageError.
    """
    with torch.device("meta"):
        if isinstance(config, UNetConfig):
            backbone = build_unet(config, n_slices, 1).encoder
        else:
            backbone = make_backbone(config, n_slices)
    if isinstance(backbone, TimmFeatures):
        used = backbone.strides if isinstance(config, UNetConfig) else config.strides
        check_map_sizes(backbone, used)


def build_criterion(config: ModelConfig, class_weights: Tensor) -> nn.Module:
    """Return what training minimises; ``class_weights`` is ``[classes]``."""
    return CRITERIA[config.name](config, class_weights)


def forward_training(network: nn.Module, images: Tensor, targets: list[Target]) -> Any:
    """Return the raw outputs that the criterion takes: a two-stage model draws regions by the truth."""
    if isinstance(network, FasterRCNN):
        return network(images, targets)
    return network(images)


def detect(
    network: nn.Module,
    images: Tensor,
    *,
    flips: bool,
    score_thresh: float,
    nms_thresh: float,
    detections_per_img: int,
) -> list[MaskDetections]:
    """Return the boxes of each of ``images`` ``[batch, slice, row, column]``, by falling score.

    With ``flips`` the four mirror images of a slice are asked too: of a one-stage model the raw outputs
    are averaged, anchor by anchor; of a two-stage one the boxes are fused, as each view has its own.
    """
    settings = {
        "score_thresh": score_thresh,
        "nms_thresh": nms_thresh,
        "detections_per_img": detections_per_img,
    }
    if isinstance(network, UNet):
        raise TypeError("A U-Net draws no boxes; ask it with segment.")
    if not isinstance(network, FasterRCNN):
        # Whatever has RetinaNet's outputs will do: an exported graph, a stand-in.
        raw = detect_with_flips(network, images) if flips else network(images)  # type: ignore[arg-type]
        return select_with_masks(raw, **settings)  # type: ignore[arg-type]
    size = (images.shape[-2], images.shape[-1])
    views: list[Sequence[MaskDetections]] = []
    for axes in MIRRORED_AXES if flips else MIRRORED_AXES[:1]:
        mirrored = images.flip(axes) if axes else images
        found = network.select(network(mirrored), **settings)  # type: ignore[arg-type]
        views.append([mirror_detections(item, size, axes) for item in found])
    if len(views) == 1:
        return list(views[0])
    return [fuse_views(parts, **settings) for parts in zip(*views, strict=True)]  # type: ignore[arg-type]


def segment(network: nn.Module, images: Tensor, *, flips: bool) -> Tensor:
    """Return probabilities ``[batch, 1 + classes, row, column]``, background first, of a U-Net."""
    if not isinstance(network, UNet):
        raise TypeError(f"Expected a U-Net; got {type(network).__name__}.")
    views = []
    for axes in MIRRORED_AXES if flips else MIRRORED_AXES[:1]:
        mirrored = images.flip(axes) if axes else images
        found = network(mirrored).logits.float().softmax(dim=1)
        views.append(found.flip(axes) if axes else found)
    return torch.stack(views).mean(dim=0)
