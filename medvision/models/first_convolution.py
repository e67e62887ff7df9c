"""The first convolution of a colour network, for any number of slices and windows."""

from __future__ import annotations

import torch
from torch import Tensor

from medvision.errors import UsageError

COLOURS = 3


def adapt_first_convolution(weight: Tensor, in_channels: int) -> Tensor:
    """Take ``[out, 3, row, column]`` to ``[out, in_channels, row, column]``.

    The response to one image repeated over all channels stays what it was (inflation: Carreira and
    Zisserman, Quo Vadis, Action Recognition?, CVPR 2017). Channel i takes the weights of colour i mod 3,
    divided among the channels that share that colour: filters that tell red from green then tell one
    slice from the next, where a mean over the colours would leave them without response. Fewer than
    three channels share the sum of the colours. UsageError if there are not three.
    """
    if weight.ndim != 4 or weight.shape[1] != COLOURS or in_channels < 1:
        raise UsageError(
            "A first convolution can be adapted from 3 channels to 1 or more; got weights of shape "
            f"{tuple(weight.shape)} for {in_channels} channels."
        )
    if in_channels < COLOURS:
        return weight.sum(dim=1, keepdim=True).repeat(1, in_channels, 1, 1) / in_channels
    colour = torch.arange(in_channels, device=weight.device) % COLOURS
    sharing = torch.bincount(colour, minlength=COLOURS)[colour]
    return weight[:, colour] / sharing.to(weight.dtype)[None, :, None, None]


def fold_input_scale(
    weight: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Move the input's normalisation into the first convolution.

    ``weight`` is ``[out, 3, row, column]``, trained on (v - mean) / std for values v in 0..1; medvision's
    networks see x = 2 v - 1. Returns the weights for x, and what each of the ``out`` responses then
    lacks (to be subtracted from the mean of the batch norm that follows). Exact but at the border,
    where the padding's zeros mean grey for x and the mean colour for the weights.
    """
    spread = torch.tensor(std, dtype=weight.dtype, device=weight.device)[None, :, None, None]
    middle = torch.tensor(mean, dtype=weight.dtype, device=weight.device)[None, :, None, None]
    lacking = (weight * (0.5 - middle) / spread).sum(dim=(1, 2, 3))
    return weight * 0.5 / spread, lacking
