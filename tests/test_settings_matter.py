"""No setting of a model does nothing: each, changed, changes the network, its losses or what it finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from medvision.models.family import build_criterion, build_model, detect, forward_training, segment
from medvision.models.family_config import MODEL_CONFIGS
from medvision.models.unet_config import UNetConfig
from medvision.training.settings_help import setting_names
from medvision.training.targets import CropLabel, OutlineTargets, make_target

CLASSES = 2
ANCHORS = [[[6, 6], [9, 5]], [[12, 12], [16, 20]], [[24, 24], [30, 20]]]
DETECTOR: dict[str, Any] = {"width": 8, "pyramid_channels": 8, "anchor_sizes": ANCHORS}
BASES: dict[str, dict[str, Any]] = {
    "retinanet": {**DETECTOR, "head_depth": 1},
    "faster-rcnn": {**DETECTOR, "level_rule": {"k0": 3, "canonical_size": 12.0}},
    "mask-rcnn": {**DETECTOR, "level_rule": {"k0": 3, "canonical_size": 12.0}},
    "retina-unet": {**DETECTOR, "head_depth": 1},
    "unet": {"depth": 3, "base_channels": 4},
}
CHANGES: dict[str, Any] = {
    "backbone": "resnet18",
    "blocks": [1, 1, 1, 1],
    "width": 16,
    "stem_pooling": True,
    "norm": "group",
    "stage_convolution": "dilated",
    "inner_windows": [[0.2, 0.6]],
    "pyramid_channels": 16,
    "pyramid": "lateral-only",
    "anchor_sizes": [[[7, 7], [9, 5]], *ANCHORS[1:]],
    "head": "shared",
    "head_depth": 2,
    "lesion_loss": "balanced-cross-entropy",
    "focal_alpha": 0.6,
    "focal_gamma": 1.0,
    "balanced_alpha": 0.5,
    "negatives_per_positive": 1,
    "varifocal_alpha": 0.5,
    "varifocal_gamma": 1.0,
    "box_loss": "smooth-l1",
    "smooth_l1_beta": 1.0,
    "box_weight": 2.0,
    "class_weight": 2.0,
    "matcher": "iou",
    "atss_candidates": 2,
    "fg_iou_thresh": 0.9,
    "bg_iou_thresh": 0.1,
    "low_quality_matches": False,
    "segmentation_stride": 1,
    "segmentation_channels": 8,
    "depth": 2,
    "loss": "sampled",
    "foreground_iou": 0.9,
    "background_iou": 0.05,
    "anchors_sampled": 8,
    "positive_share": 0.05,
    "pre_nms_top_n": 3,
    "post_nms_top_n_training": 3,
    "post_nms_top_n": 3,
    "nms_thresh": 0.1,
    "k0": 2,
    "canonical_size": 30.0,
    "pooling": "deformable",
    "pool_size": 5,
    "sampling_ratio": 1,
    "sampling": "ohem",
    "regions_sampled": 4,
    "ohem_nms_thresh": 0.01,
    "channels": 8,
    "per_class": True,
    "regions_trained": 1,
    "weight": 2.0,
    "mask_thresh": 0.51,
    "encoder": "resnet18",
    "encoder_norm": "group",
    "encoder_convolution": "dilated",
    "base_channels": 8,
    "dropout": 0.5,
    "upsampling": "bilinear",
    "padding": "valid",
    "deep_supervision": [0.5],
    "dice": 2.0,
    "cross_entropy": 2.0,
    "focal": 1.0,
    "tversky": 1.0,
    "focal_tversky": 1.0,
    "tversky_alpha": 0.6,
    "tversky_beta": 0.2,
    "focal_tversky_power": 0.5,
    "background_weight": 0.5,
    "border_weight": 5.0,
    "border_sigma": 20.0,
}
"""For each setting, by the last part of its name, a value that no default is."""

OTHERWISE = {
    "model.head": "shared",
    "model.proposals.foreground_iou": 0.35,
    "model.regions.head": "convolutions",
    "model.regions.loss": "focal",
    "model.mask.depth": 2,
    "model.mask.pool_size": 8,
    "unet:model.norm": "instance",
    "unet:model.depth": 2,
    "unet:model.pooling": "average",
}
"""The same for those whose last part means something else in another place."""

NEEDS: dict[str, dict[str, Any]] = {
    "model.stem_pooling": {"pyramid": "finest-only", "anchor_sizes": ANCHORS[:1]},
    "model.encoder": {"depth": 4},
    "model.balanced_alpha": {"lesion_loss": "balanced-cross-entropy"},
    "model.negatives_per_positive": {"lesion_loss": "hard-negative-mining"},
    "model.varifocal_alpha": {"lesion_loss": "varifocal"},
    "model.varifocal_gamma": {"lesion_loss": "varifocal"},
    "model.smooth_l1_beta": {"box_loss": "smooth-l1"},
    "model.fg_iou_thresh": {"matcher": "iou", "low_quality_matches": False},
    "model.bg_iou_thresh": {"matcher": "iou"},
    "model.low_quality_matches": {"matcher": "iou"},
    "model.proposals.foreground_iou": {"proposals": {"matcher": "iou"}},
    "model.proposals.background_iou": {"proposals": {"matcher": "iou"}},
    "model.proposals.anchors_sampled": {"proposals": {"loss": "sampled"}},
    "model.proposals.positive_share": {"proposals": {"loss": "sampled", "anchors_sampled": 16}},
    "model.regions.positive_share": {"regions": {"regions_sampled": 16}},
    "model.regions.ohem_nms_thresh": {"regions": {"sampling": "ohem", "regions_sampled": 128}},
    "model.regions.focal_gamma": {"regions": {"loss": "focal"}},
    "model.encoder_norm": {"encoder": "resnet18", "depth": 4},
    "model.encoder_convolution": {"encoder": "resnet18", "depth": 4},
    "model.loss.focal_gamma": {"loss": {"focal": 1.0}},
    "model.loss.tversky_alpha": {"loss": {"tversky": 1.0}},
    "model.loss.tversky_beta": {"loss": {"tversky": 1.0}},
    "model.loss.focal_tversky_power": {"loss": {"focal_tversky": 1.0}},
    "model.loss.border_sigma": {"loss": {"border_weight": 5.0}},
    "model.segmentation_loss.focal_gamma": {"segmentation_loss": {"focal": 1.0}},
    "model.segmentation_loss.tversky_alpha": {"segmentation_loss": {"tversky": 1.0}},
    "model.segmentation_loss.tversky_beta": {"segmentation_loss": {"tversky": 1.0}},
    "model.segmentation_loss.focal_tversky_power": {"segmentation_loss": {"focal_tversky": 1.0}},
    "model.segmentation_loss.border_sigma": {"segmentation_loss": {"border_weight": 5.0}},
}
"""What must be chosen for a setting to have a say."""

ELSEWHERE = {"model.name", "model.anchors_per_level", "model.padding"}
"""Chooses the model; used where anchors are fitted (test_training); refused by train (test_unet)."""

CASES = [
    (model, name)
    for model, config in MODEL_CONFIGS.items()
    for name in setting_names(config, "model.")
    if name not in ELSEWHERE
]


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested ``values`` with nested ``changes``."""
    both = {**values}
    for name, value in changes.items():
        inner = isinstance(value, dict) and isinstance(values.get(name), dict)
        both[name] = merged(values[name], value) if inner else value
    return both


def nested(name: str, value: object) -> dict[str, Any]:
    """Return the table that the dotted ``name``, without the leading model, stands for."""
    for part in reversed(name.split(".")[1:]):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def crop(settings: BaseModel) -> tuple[Tensor, Any]:
    """Return an image ``[1, 3, 64, 64]`` with three lesions, two of them close, and its target."""
    torch.manual_seed(1)
    image = torch.rand(1, 3, 64, 64)
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[8:16, 10:18] = 1
    labels[8:14, 21:30] = 2
    labels[30:55, 20:48] = 3
    table = [CropLabel(0, 64), CropLabel(1, 54), CropLabel(0, 700)]
    weighing = getattr(settings, "loss", None) or getattr(settings, "segmentation_loss", None)
    outlines = OutlineTargets(0.0, 5.0)
    if isinstance(weighing, BaseModel):
        outlines = OutlineTargets(weighing.border_weight, weighing.border_sigma)  # type: ignore[attr-defined]
    return image, make_target(labels, table, 0.5, outlines)


def fingerprint(model: str, changes: dict[str, Any]) -> list[float]:
    """Return numbers that depend on all that a model is: its size, its losses and what it finds."""
    values = merged(BASES[model], changes)
    if "backbone" in changes:
        del values["width"]  # of the narrow ResNet alone
    config: Any = MODEL_CONFIGS[model](**values)
    image, target = crop(config)
    torch.manual_seed(0)
    network = build_model(config, 3, CLASSES)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)  # blocks start shut, whatever is in them
    criterion = build_criterion(config, torch.tensor([1.0, 2.0]))
    prints = [float(sum(value.numel() for value in network.parameters()))]
    losses = criterion(forward_training(network, image, [target]), [target])
    prints += [value.item() for value in losses.values()]
    network.eval()
    with torch.no_grad():
        if isinstance(config, UNetConfig):
            return [
                *prints,
                *segment(network, image, flips=False)[0, :, ::9, ::9].flatten().tolist(),
            ]
        options = {"score_thresh": 0.0, "nms_thresh": 0.9, "detections_per_img": 300}
        (found,) = detect(network, image, flips=False, **options)  # type: ignore[arg-type]
    prints += [len(found["boxes"]), *found["boxes"].flatten().tolist(), *found["scores"].tolist()]
    if "masks" in found:
        prints += found["masks"].sum(dim=(1, 2)).tolist()
    return prints


@pytest.mark.parametrize(("model", "name"), CASES)
def test_a_changed_setting_changes_something(model: str, name: str) -> None:
    last = name.rpartition(".")[2]
    value = OTHERWISE.get(f"{model}:{name}", OTHERWISE.get(name, CHANGES.get(last)))
    assert value is not None, "a new setting needs a value to be tried with"
    needed = NEEDS.get(name, {})
    before = fingerprint(model, needed)
    assert fingerprint(model, needed) == before, "the comparison itself must not be luck"
    assert fingerprint(model, merged(needed, nested(name, value))) != before
