"""TensorFlow's "same" padding, which depends on the input's size, as a constant that exports take."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class SamePadConv2d(nn.Conv2d):
    """TensorFlow's "same" padding, for sides that are multiples of the stride: what is odd comes last.

    timm's Conv2dSame computes it anew from each input's size, which takes an export minutes.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Take ``[batch, channel, row, column]`` to a map ``stride`` times smaller."""
        missing = [
            max(0, dilation * (kernel - 1) + 1 - stride)
            for kernel, stride, dilation in zip(
                self.kernel_size, self.stride, self.dilation, strict=True
            )
        ]
        edges = [part for total in reversed(missing) for part in (total // 2, total - total // 2)]
        return super().forward(functional.pad(features, edges))


def fix_padding(module: nn.Module) -> None:
    """Put :class:`SamePadConv2d` in place of timm's Conv2dSame, with its weights."""
    for name, child in module.named_children():
        if type(child).__name__ == "Conv2dSame" and isinstance(child, nn.Conv2d):
            fixed = SamePadConv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,  # type: ignore[arg-type]
                child.stride,  # type: ignore[arg-type]
                0,
                child.dilation,  # type: ignore[arg-type]
                child.groups,
                child.bias is not None,
                device="meta",
            )
            fixed.weight, fixed.bias = child.weight, child.bias
            setattr(module, name, fixed)
        else:
            fix_padding(child)
