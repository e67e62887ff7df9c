"""U-Net: an encoder that sees far, a decoder that places exactly, and skips that join them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvision.errors import UsageError
from medvision.models.backbones import build_backbone
from medvision.models.retinanet import InnerWindows
from medvision.models.timm_backbone import TIMM_PREFIX
from medvision.models.unet_blocks import center_crop, convolutions, downsampling, upsampling
from medvision.models.unet_config import (
    ARCHITECTURE,
    OWN_ENCODER,
    UNetConfig,
    check_architecture,
    record_architecture,
    valid_output_size,
)

_PRIOR = 0.1


class RawSegmentation(NamedTuple):
    """What the network says of every pixel, before the softmax."""

    logits: Tensor  # [batch, 1 + classes, row, column]; channel 0 is background
    auxiliary: tuple[Tensor, ...]  # of coarser maps, in training only; same shape, finest first


class FeatureExtractor(Protocol):
    """What the decoder needs of an encoder; medvision.models.backbone.Backbone says what each means."""

    channels: list[int]
    strides: list[int]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return one map a stride."""


class UNetEncoder(nn.Module):
    """The contracting path: two 3 x 3 convolutions, then half the resolution and twice the channels.

    Ronneberger et al., U-Net, MICCAI 2015, figure 1.
    """

    def __init__(self, in_channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.strides = config.strides
        self.channels = [config.base_channels * stride for stride in self.strides]
        sources = [in_channels, *self.channels[:-1]]
        self.blocks = nn.ModuleList(
            convolutions(before, after, config)
            for before, after in zip(sources, self.channels, strict=True)
        )
        self.halvings = nn.ModuleList(
            downsampling(config.pooling, channels) for channels in self.channels[:-1]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Take ``[batch, channel, row, column]`` to ``depth + 1`` maps, finest first."""
        maps = [self.blocks[0](images)]
        for halve, block in zip(self.halvings, self.blocks[1:], strict=True):
            maps.append(block(halve(maps[-1])))
        return maps


class UNetDecoder(nn.Module):
    """The expanding path: up-sample, lay the encoder's map of that resolution beside it, convolve.

    At stride s the decoder has ``base_channels * s`` channels. Where the encoder has no map, as at
    full resolution of a ResNet, a step goes without one.
    """

    def __init__(self, channels: list[int], strides: list[int], config: UNetConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(config.dropout)
        self.steps = nn.ModuleList()
        self.skips: list[int | None] = []
        self.strides: list[int] = []
        width, stride = channels[-1], strides[-1]
        for skip, goal in _goals(strides):
            beside = 0 if skip is None else channels[skip]
            out = config.base_channels * goal
            self.steps.append(UpStep(width, beside, out, stride // goal, config))
            self.skips.append(skip)
            self.strides.append(goal)
            width, stride = out, goal

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Take the encoder's maps to the decoder's, finest (stride 1) first."""
        features, decoded = self.dropout(maps[-1]), []
        for step, skip in zip(self.steps, self.skips, strict=True):
            features = step(features, None if skip is None else maps[skip])
            decoded.append(features)
        return decoded[::-1]


def _goals(strides: list[int]) -> list[tuple[int | None, int]]:
    """Return the decoder's steps: which map of the encoder each takes in, at which stride."""
    steps: list[tuple[int | None, int]] = []
    wanted: list[tuple[int | None, int]] = []
    wanted.extend(reversed(list(enumerate(strides[:-1]))))
    stride = strides[-1]
    for skip, goal in [*wanted, (None, 1)] if strides[0] > 1 else wanted:
        while stride > 2 * goal:
            stride //= 2
            steps.append((None, stride))
        steps.append((skip, goal))
        stride = goal
    return steps


class UpStep(nn.Module):
    """Up-sample by ``scale`` (1 or 2), concatenate the skip, two 3 x 3 convolutions."""

    def __init__(self, below: int, beside: int, out: int, scale: int, config: UNetConfig) -> None:
        super().__init__()
        self.upsample = upsampling(config.upsampling, below, out) if scale == 2 else None
        self.crop = config.padding == "valid"
        joined = (out if scale == 2 else below) + beside
        self.convolve = convolutions(joined, out, config)

    def forward(self, features: Tensor, skip: Tensor | None) -> Tensor:
        """Take the coarser map and the encoder's map of this resolution to the finer map."""
        if self.upsample is not None:
            features = self.upsample(features)
        if skip is not None:
            if self.crop:
                skip = center_crop(skip, (features.shape[-2], features.shape[-1]))
            features = torch.cat((skip, features), dim=1)
        return self.convolve(features)


class UNet(nn.Module):
    """Classifies every pixel of the middle slice: background or one of the lesion classes.

    Ronneberger et al., U-Net: Convolutional Networks for Biomedical Image Segmentation, MICCAI 2015.
    With padding ``same`` a picture of any size gives an output of that size: it is padded by its edge
    to a multiple of the coarsest stride, below and to the right. With ``valid`` the output covers the middle.
    """

    def __init__(
        self, encoder: FeatureExtractor, config: UNetConfig, n_slices: int, classes: int
    ) -> None:
        super().__init__()
        self.windows = InnerWindows(config.inner_windows)
        self.encoder = encoder
        self.decoder = UNetDecoder(encoder.channels, encoder.strides, config)
        self.strides, self.valid = config.strides, config.padding == "valid"
        self.output_strides = self.decoder.strides[::-1][: 1 + len(config.deep_supervision)]
        self.heads = nn.ModuleList(
            _head(config.base_channels * stride, classes) for stride in self.output_strides
        )
        record = list(record_architecture(config, n_slices, classes))
        self.register_buffer(ARCHITECTURE, torch.tensor(record, dtype=torch.uint8))
        self.register_load_state_dict_pre_hook(_refuse_other_weights)

    def forward(self, images: Tensor) -> RawSegmentation:
        """Take ``[batch, slice, row, column]`` in 0..1 to logits of every pixel.

        Raises InputError for a size that padding ``valid`` does not fit.
        """
        size = self._output_size(images)
        decoded = self.decoder(self.encoder(self.windows(self._padded(images))))
        heads = list(self.heads) if self.training else [self.heads[0]]
        outputs = []
        for head, stride, features in zip(heads, self.output_strides, decoded, strict=False):
            logits = head(features).float()
            if stride > 1:
                logits = functional.interpolate(logits, scale_factor=stride, mode="bilinear")
            outputs.append(self._fitted(logits, size))
        return RawSegmentation(outputs[0], tuple(outputs[1:]))

    def _output_size(self, images: Tensor) -> tuple[int, int]:
        rows, columns, depth = images.shape[-2], images.shape[-1], len(self.strides) - 1
        if self.valid:
            return valid_output_size(rows, depth), valid_output_size(columns, depth)
        return rows, columns

    def _padded(self, images: Tensor) -> Tensor:
        if self.valid:
            return images
        below, right = (-images.shape[axis] % self.strides[-1] for axis in (-2, -1))
        return functional.pad(images, (0, right, 0, below), mode="replicate")

    def _fitted(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        if self.valid:
            return center_crop(logits, size)
        return logits[..., : size[0], : size[1]]


def _head(channels: int, classes: int) -> nn.Conv2d:
    head = nn.Conv2d(channels, 1 + classes, 1)
    nn.init.normal_(head.weight, std=0.01)
    # At 1 percent, as in a detector, Dice and Tversky have hardly a slope: whole classes were never found.
    bias = torch.zeros(1 + classes)
    bias[0] = math.log((1 - _PRIOR) / _PRIOR * classes)
    head.bias = nn.Parameter(bias)
    return head


def build_unet(
    config: UNetConfig, n_slices: int, classes: int, encoder: FeatureExtractor | None = None
) -> UNet:
    """Assemble the U-Net that ``config`` describes, on ``encoder`` if one is given.

    Else on the encoder that it names; a ResNet keeps the pooling of its stem from depth 5 on.
    An encoder takes ``n_slices * (1 + windows)`` channels. Raises UsageError for a name that is not known and
    for a coarsest stride that is not 2^depth.
    """
    channels = n_slices * (1 + len(config.inner_windows))
    if encoder is None and config.encoder == OWN_ENCODER:
        encoder = UNetEncoder(channels, config)
    elif encoder is None:
        pooling = config.depth > 4 or config.encoder.startswith(TIMM_PREFIX)
        encoder = build_backbone(
            config.encoder,
            channels,
            stem_pooling=pooling,
            norm=config.encoder_norm,
            stage_convolution=config.encoder_convolution,
        )
    if encoder.strides[-1] != config.strides[-1]:
        coarsest = encoder.strides[-1]
        depth = coarsest.bit_length() - 1
        raise UsageError(
            f"The coarsest map of {config.encoder} has stride {coarsest}; "
            f"depth {config.depth} needs {config.strides[-1]}.",
            do=f"Set depth to {depth}." if coarsest == 1 << depth else "Choose another encoder.",
        )
    return UNet(encoder, config, n_slices, classes)


def _refuse_other_weights(
    network: UNet, tensors: dict[str, Tensor], prefix: str, *others: Any
) -> None:
    """Raise InputError before weights of another architecture are loaded."""
    found = tensors.get(prefix + ARCHITECTURE)
    if found is not None:
        check_architecture(found.tolist(), network.get_buffer(ARCHITECTURE).tolist())
