"""Models of the package timm that give their inner maps, for any image size, as backbones."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from medvision.errors import UsageError, first_line
from medvision.models.backbone import Backbone
from medvision.models.choices import BACKBONES
from medvision.models.same_padding import SamePadConv2d, fix_padding

TIMM_PREFIX = "timm/"


class TimmFeatures(Backbone):
    """A model of the timm package that gives its inner maps (``features_only``), finest first.

    Maps of a stride seen before replace it: one map for each stride, the deepest.
    """

    def __init__(self, name: str, in_channels: int) -> None:
        super().__init__()
        self.name = name
        self.in_channels = in_channels
        self.body: Any = _create_timm(name, in_channels)
        fix_padding(self.body)
        self.first_convolution, self.first_norm = _first_layers(self.body, in_channels)
        reductions = list(self.body.feature_info.reduction())
        self.kept = [
            index for index, at in enumerate(reductions) if at not in reductions[index + 1 :]
        ]
        widths = list(self.body.feature_info.channels())
        self.channels = [widths[index] for index in self.kept]
        self.strides = [reductions[index] for index in self.kept]
        self.channel_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> list[Tensor]:
        """Take ``[batch, channel, row, column]`` to the maps, finest first."""
        maps = self.body(images)
        kept = [maps[index] for index in self.kept]
        return [features.permute(0, 3, 1, 2) for features in kept] if self.channel_last else kept


def check_map_sizes(backbone: TimmFeatures, strides: list[int]) -> None:
    """Refuse a model whose maps are not as many times smaller than the image as timm says they are.

    Some lose pixels at the edges or take one size only. ``backbone`` is on the meta device and nothing is
    computed; ``strides`` are those of the maps that are used. UsageError.
    """
    coarsest = backbone.strides[-1]
    size = (3 * coarsest, 4 * coarsest)
    try:
        maps = backbone.eval()(torch.empty(1, backbone.in_channels, *size, device="meta"))
    except Exception as error:  # a model made for one size can raise anything
        raise UsageError(
            f"timm's {backbone.name} does not take images of {size[0]} x {size[1]} pixels; crops and slices "
            "have any size.",
            why=first_line(error),
            do="Choose another convolutional model.",
        ) from error
    for stride, found in zip(backbone.strides, maps, strict=True):
        wanted = [side // stride for side in size]
        if stride in strides and list(found.shape[-2:]) != wanted:
            raise UsageError(
                f"timm's {backbone.name} gives a map of {found.shape[-2]} x {found.shape[-1]} at stride "
                f"{stride} for {size[0]} x {size[1]} pixels; {wanted[0]} x {wanted[1]} is needed.",
                do="Choose another convolutional model.",
            )


def import_timm(name: str) -> Any:
    """Return the package timm; UsageError for the backbone ``name`` if it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"The backbone {name} needs the package timm, which is not installed.",
            do="pip install timm, or choose one of " + ", ".join(BACKBONES) + ".",
        ) from error
    return timm


def _create_timm(name: str, in_channels: int) -> Any:
    timm = import_timm(TIMM_PREFIX + name)
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
            why=first_line(error),
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


def _first_layers(body: nn.Module, in_channels: int) -> tuple[str, str]:
    """Return the names of the first convolution and, if it follows at once, of its batch norm.

    None ("") if it does not see the image itself, or changes its weights before it uses them.
    """
    layers = [
        (name, module)
        for name, module in body.named_modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm))
    ]
    convolution = next((i for i, (_, m) in enumerate(layers) if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        return "", ""
    first = layers[convolution][1]
    if type(first) not in (nn.Conv2d, SamePadConv2d) or first.in_channels != in_channels:
        return "", ""
    following = layers[convolution + 1 : convolution + 2]
    norm = [name for name, module in following if isinstance(module, nn.BatchNorm2d)]
    return f"body.{layers[convolution][0]}", f"body.{norm[0]}" if norm else ""
