"""Every backbone by its name: ResNet-18 to -152, the narrow ResNet of the default, any timm model."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torchvision
from torch import Tensor, nn

from medvision.errors import UsageError
from medvision.models.backbone import ResNet
from medvision.models.deformable import deform_stages
from medvision.models.norms import convert_norms
from medvision.models.pyramid_config import (
    FINEST_STRIDE,
    NARROW,
    Norm,
    PyramidConfig,
    StageConvolution,
)

TIMM_PREFIX = "timm/"
Colours = tuple[float, ...]
PLAIN_INPUT: tuple[Colours, Colours] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and std of values in 0..1 that normalise them to -1..1, medvision's own range."""


class ResNetFeatures(nn.Module):
    """The ResNet of the paper, without its classifier: one map for each stride, finest first.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, with the stride in the 3 x 3
    convolution as torchvision has it. The maps are those of the stem and the four stages, at strides
    2, 4, 8, 16, 32: for 224 pixels 112, 56, 28, 14, 7. Without ``stem_pooling`` stem and first stage
    share stride 2, and the maps are those of the stages: 112, 56, 28, 14. Names in the state dict
    are torchvision's.
    """

    first_convolution = "conv1"
    first_norm = "bn1"

    def __init__(self, name: str, in_channels: int, stem_pooling: bool = True) -> None:
        super().__init__()
        # A block that starts as the identity trains faster from scratch (Goyal et al. 2017).
        whole: Any = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
        self.conv1 = whole.conv1 if in_channels == 3 else _stem(in_channels, whole.conv1)
        self.bn1: nn.Module = whole.bn1
        self.stem_pooling = nn.MaxPool2d(3, 2, 1) if stem_pooling else nn.Identity()
        self.layer1, self.layer2 = whole.layer1, whole.layer2
        self.layer3, self.layer4 = whole.layer3, whole.layer4
        widths = [whole.fc.in_features >> down for down in (3, 2, 1, 0)]
        self.channels: list[int] = [self.conv1.out_channels, *widths] if stem_pooling else widths
        self.strides: list[int] = [2 << index for index in range(len(self.channels))]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Take ``[batch, channel, row, column]`` to the maps, finest first."""
        features = nn.functional.relu(self.bn1(self.conv1(images)))
        maps = [features] if len(self.channels) == 5 else []
        features = self.stem_pooling(features)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
            maps.append(features)
        return maps


class TimmFeatures(nn.Module):
    """Any model of the timm package that gives its inner maps (``features_only``), finest first.

    Maps of a stride seen before replace it: one map for each stride, the deepest.
    """

    def __init__(self, name: str, in_channels: int) -> None:
        super().__init__()
        self.name = name
        self.body: Any = _create_timm(name, in_channels)
        self.first_convolution, self.first_norm = _first_layers(self.body)
        reductions = list(self.body.feature_info.reduction())
        self.kept = [
            index for index, at in enumerate(reductions) if at not in reductions[index + 1 :]
        ]
        widths = list(self.body.feature_info.channels())
        self.channels: list[int] = [widths[index] for index in self.kept]
        self.strides: list[int] = [reductions[index] for index in self.kept]
        self.channel_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> list[Tensor]:
        """Take ``[batch, channel, row, column]`` to the maps, finest first."""
        maps = self.body(images)
        kept = [maps[index] for index in self.kept]
        return [features.permute(0, 3, 1, 2) for features in kept] if self.channel_last else kept


Backbone = ResNet | ResNetFeatures | TimmFeatures
"""A module with ``channels`` and ``strides`` of the maps that it returns, finest first."""


def _narrow(name: str, in_channels: int, stem_pooling: bool) -> Backbone:
    return ResNet(in_channels, stem_pooling=stem_pooling)


_BUILDERS: dict[str, Callable[[str, int, bool], Backbone]] = {
    NARROW: _narrow,
    "resnet18": ResNetFeatures,
    "resnet34": ResNetFeatures,
    "resnet50": ResNetFeatures,
    "resnet101": ResNetFeatures,
    "resnet152": ResNetFeatures,
}

STAGES = ("stages.0", "stages.1", "stages.2", "stages.3")
LAYERS = ("layer1", "layer2", "layer3", "layer4")
"""Names of the stages, in the narrow ResNet and in torchvision's."""

BACKBONES = tuple(_BUILDERS)
"""Names that :func:`build_backbone` knows, besides timm/NAME."""


def make_backbone(config: PyramidConfig, in_channels: int) -> Backbone:
    """Return the backbone that the settings of a pyramid detector name, not pretrained.

    UsageError for one whose strides are not those that the settings count on.
    """
    name = config.backbone
    if name == NARROW:
        backbone: Backbone = ResNet(in_channels, config.blocks, config.width, config.stem_pooling)
        _adapt(backbone, config.norm, config.stage_convolution)
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
        if stage_convolution != "plain":
            raise UsageError(
                f"The convolutions can be changed in a ResNet only; got {name}.",
                do=f"Choose one of {', '.join(BACKBONES)}, or plain convolutions.",
            )
        backbone: Backbone = TimmFeatures(name.removeprefix(TIMM_PREFIX), in_channels)
    elif name in _BUILDERS:
        backbone = _BUILDERS[name](name, in_channels, stem_pooling)
    else:
        raise _unknown(name)
    _adapt(backbone, norm, stage_convolution)
    return backbone


def _adapt(backbone: Backbone, norm: Norm, stage_convolution: StageConvolution) -> None:
    """Convert the norms and the 3 x 3 convolutions of the last three stages in place."""
    if norm == "frozen":
        _open_blocks(backbone)
    convert_norms(backbone, norm)
    if stage_convolution != "plain":
        stages = STAGES if isinstance(backbone, ResNet) else LAYERS
        deform_stages(backbone, stage_convolution, stages[1:])


def expected_input(name: str) -> tuple[Colours, Colours]:
    """Return mean and std of the colours (values 0..1) that published weights of ``name`` expect."""
    if name.startswith(TIMM_PREFIX):
        published = _timm(name).get_pretrained_cfg(name.removeprefix(TIMM_PREFIX))
        return (tuple(published.mean), tuple(published.std)) if published else PLAIN_INPUT
    if name not in torchvision.models.list_models():
        return PLAIN_INPUT
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return tuple(preset.mean), tuple(preset.std)


def first_layers(backbone: Backbone) -> tuple[str, str]:
    """Return the names of the first convolution and of the batch norm after it; "" if there is none."""
    if isinstance(backbone, ResNet):
        return "stem.0", "stem.1"
    return backbone.first_convolution, backbone.first_norm


def _open_blocks(backbone: nn.Module) -> None:
    """Set all scales to 1: frozen at its start of 0, a block would stay shut for good."""
    for part in backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)


def _unknown(name: str) -> UsageError:
    near = difflib.get_close_matches(name, BACKBONES, 1)
    guess = f" Did you mean {near[0]}?" if near else ""
    return UsageError(
        f"There is no backbone {name!r}.{guess}",
        do=f"Choose one of {', '.join(BACKBONES)}, or timm/NAME for a model of the timm package.",
    )


def _stem(in_channels: int, colour: nn.Conv2d) -> nn.Conv2d:
    stem = nn.Conv2d(in_channels, colour.out_channels, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"The backbone {name} needs the package timm, which is not installed.",
            do="pip install timm, or choose one of " + ", ".join(BACKBONES) + ".",
        ) from error
    return timm


def _create_timm(name: str, in_channels: int) -> Any:
    timm = _timm(TIMM_PREFIX + name)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        raise UsageError(
            f"timm {timm.__version__} has no model {name!r}.",
            do=f"Did you mean timm/{near[0]}?" if near else "See timm.list_models().",
        )
    try:
        model = timm.create_model(name, pretrained=False, features_only=True, in_chans=in_channels)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UsageError(
            f"timm's {name} does not give its inner maps (features_only).",
            why=str(error).splitlines()[0],
            do="Choose a convolutional model.",
        ) from error
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        raise UsageError(
            f"timm's {name} takes images of {published.input_size[-1]} x {published.input_size[-2]} pixels "
            "only; crops and slices have other sizes.",
            do="Choose a convolutional model.",
        )
    return model


def _first_layers(body: nn.Module) -> tuple[str, str]:
    """Return the names of the first convolution and, if it follows at once, of its batch norm."""
    layers = [
        (name, module)
        for name, module in body.named_modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm))
    ]
    convolution = next((i for i, (_, m) in enumerate(layers) if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        return "", ""
    following = layers[convolution + 1 : convolution + 2]
    norm = [name for name, module in following if isinstance(module, nn.BatchNorm2d)]
    return f"body.{layers[convolution][0]}", f"body.{norm[0]}" if norm else ""
