"""Every backbone by its name, with the norms and the convolutions that the settings ask for."""

from __future__ import annotations

import difflib

import torch
import torchvision
from torch import nn

from medvision.errors import UsageError
from medvision.models.backbone import Backbone, ResNet
from medvision.models.choices import BACKBONES, NARROW, find_choice
from medvision.models.deformable import deform_stages
from medvision.models.norms import convert_norms
from medvision.models.pyramid_config import FINEST_STRIDE, Norm, PyramidConfig, StageConvolution
from medvision.models.timm_backbone import TIMM_PREFIX, TimmFeatures, import_timm

Colours = tuple[float, ...]
PLAIN_INPUT: tuple[Colours, Colours] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and std of values in 0..1 that normalise them to -1..1, medvision's own range."""


def make_backbone(config: PyramidConfig, in_channels: int) -> Backbone:
    """Return the backbone that the settings of a pyramid detector name, not pretrained.

    UsageError for one whose strides are not those that the settings count on.
    """
    name = config.backbone
    if name == NARROW:
        backbone: Backbone = ResNet(in_channels, config.blocks, config.width, config.stem_pooling)
        _adapt(backbone, name, config.norm, config.stage_convolution)
    else:
        backbone = build_backbone(
            name,
            in_channels,
            stem_pooling=config.stem_pooling,
            norm=config.norm,
            stage_convolution=config.stage_convolution,
        )
    strides = [stride for stride in backbone.strides if stride >= FINEST_STRIDE]
    if strides[: len(config.strides)] != config.strides:
        raise UsageError(
            f"The maps of {name} have strides {strides}; the pyramid needs {config.strides}.",
            do="Choose another backbone.",
        )
    return backbone


def pyramid_channels(backbone: Backbone) -> list[int]:
    """Return the channels of the maps that enter a pyramid, finest first."""
    pairs = zip(backbone.channels, backbone.strides, strict=True)
    return [channels for channels, stride in pairs if stride >= FINEST_STRIDE]


def build_backbone(
    name: str,
    in_channels: int,
    *,
    stem_pooling: bool = True,
    norm: Norm = "batch",
    stage_convolution: StageConvolution = "plain",
) -> Backbone:
    """Return the backbone ``name`` for images ``[batch, in_channels, row, column]``, not pretrained.

    ``timm/NAME`` is timm's model of that name. Without ``stem_pooling`` all strides after the stem
    are halved, for small lesions; ``stage_convolution`` takes the place of the 3 x 3 convolutions of the last
    three stages; both for the ResNets only. UsageError for an unknown name, or if timm is asked for
    and not installed.
    """
    if name.startswith(TIMM_PREFIX):
        if not stem_pooling:
            raise UsageError(
                f"The pooling after the stem can be left out of a ResNet only; got {name}.",
                do=f"Choose one of {', '.join(BACKBONES)}, or keep the pooling.",
            )
        backbone: Backbone = TimmFeatures(name.removeprefix(TIMM_PREFIX), in_channels)
    elif name in BACKBONES:
        backbone = find_choice(BACKBONES, name)(name, in_channels, stem_pooling)
    else:
        raise _unknown(name)
    _adapt(backbone, name, norm, stage_convolution)
    return backbone


def _adapt(backbone: Backbone, name: str, norm: Norm, stage_convolution: StageConvolution) -> None:
    """Convert the norms and the 3 x 3 convolutions of the last three stages in place."""
    if norm != "batch" and not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules()):
        raise UsageError(
            f"{name} has no batch norm that could be {norm}.",
            do="Leave the norm at batch: the network keeps its own.",
        )
    if norm == "frozen":
        _open_blocks(backbone)
    convert_norms(backbone, norm)
    if norm == "group":
        _give_bias(backbone)
    if stage_convolution != "plain":
        changed = deform_stages(backbone, stage_convolution, backbone.stage_names[1:])
        if not changed:
            raise UsageError(
                f"The convolutions of {name} cannot be changed.",
                do="Choose a ResNet, or plain convolutions.",
            )


def expected_input(name: str) -> tuple[Colours, Colours]:
    """Return mean and std of the colours (values 0..1) that published weights of ``name`` expect."""
    if name.startswith(TIMM_PREFIX):
        published = import_timm(name).get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))
        return (tuple(published.mean), tuple(published.std)) if published else PLAIN_INPUT
    if name not in torchvision.models.list_models():
        return PLAIN_INPUT
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return tuple(preset.mean), tuple(preset.std)


def _open_blocks(backbone: nn.Module) -> None:
    """Set all scales to 1: frozen at its start of 0, a block would stay shut for good."""
    for part in backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)


def _give_bias(backbone: Backbone) -> None:
    """Give the first convolution a bias, for the shift of input that a batch norm's mean would take."""
    if backbone.first_convolution and backbone.first_norm:
        convolution = backbone.get_submodule(backbone.first_convolution)
        if convolution.bias is None:
            like = convolution.get_parameter("weight")
            convolution.bias = nn.Parameter(torch.zeros_like(like[:, 0, 0, 0]))


def _unknown(name: str) -> UsageError:
    near = difflib.get_close_matches(name, BACKBONES, 1)
    guess = f" Did you mean {near[0]}?" if near else ""
    return UsageError(
        f"There is no backbone {name!r}.{guess}",
        do=f"Choose one of {', '.join(BACKBONES)}, or timm/NAME for a model of the timm package.",
    )
