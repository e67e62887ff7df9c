"""Time deformable convolution on the CPU: python benchmarks/deformable_convolution.py [--repeats N].

Three layers (batch 4, 3 x 3, as many channels out as in) and a ResNet-50-FPN, each against torchvision's
``deform_conv2d`` and the plain convolution. The contestants take turns in one run; a figure is the ratio
of the medians. Targets: at least 5 times torchvision's forward and 3 times its forward + backward in
float32, and a network at most 1.5 times the plain one's time. torchvision's kernel has no bfloat16 on the
CPU: under autocast it works in float32, and so it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torchvision import ops
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from medvision.device import choose_device
from medvision.models.deformable import deform_conv2d, deform_stages

SIZES = ((256, 32, 32), (512, 16, 16), (128, 64, 64))
BATCH = 4
Contestant = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """The inputs of one layer; leaves, so that gradients can be asked for."""

    maps: Tensor
    offset: Tensor
    mask: Tensor
    weight: Tensor

    def leaves(self) -> list[Tensor]:
        """Return what a deformable convolution gives gradients to."""
        return [self.maps, self.offset, self.mask, self.weight]


def main(arguments: list[str] | None = None) -> int:
    """Print the two tables and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--image", type=int, default=512, help="rows and columns of the network's")
    parser.add_argument("--skip-network", action="store_true", help="only the layers")
    options = parser.parse_args(arguments)
    choose_device("cpu")  # keeps freed memory, as every medvision command does
    print(f"{torch.get_num_threads()} threads, medians of {options.repeats}, milliseconds")
    print("layer        type      pass      ours  torchvision  plain  torchvision/ours  ours/plain")
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            layer = make_layer(size, dtype)
            for backward in (False, True):
                _print_row(size, dtype, backward, time_layer(layer, backward, options.repeats))
    if not options.skip_network:
        for dtype in (torch.float32, torch.bfloat16):
            plain, deformable = time_network(options.image, dtype, options.repeats)
            print(
                f"ResNet-50-FPN {options.image} x {options.image} {_name(dtype)}: plain {plain:.0f}, "
                f"deformable {deformable:.0f}, deformable/plain {deformable / plain:.2f}"
            )
    return 0


def make_layer(size: tuple[int, int, int], dtype: torch.dtype) -> Layer:
    """Return random inputs; offsets of a pixel or two, channels last as in a network."""
    channels, height, width = size
    torch.manual_seed(0)
    maps = torch.randn(BATCH, channels, height, width, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype) / (3 * channels**0.5)
    offset = torch.randn(BATCH, 18, height, width)
    mask = torch.rand(BATCH, 9, height, width) * 2
    parts = (maps, offset, mask, weight)
    last = [p.contiguous(memory_format=torch.channels_last).requires_grad_() for p in parts]
    return Layer(*last)


def time_layer(layer: Layer, backward: bool, repeats: int) -> list[float]:
    """Return milliseconds of ours, torchvision's and the plain convolution."""
    exact = Layer(*(leaf.detach().float().requires_grad_() for leaf in layer.leaves()))

    def ours() -> Tensor:
        return deform_conv2d(
            layer.maps, layer.offset, layer.weight, None, (1, 1), (1, 1), mask=layer.mask
        )

    def torchvisions() -> Tensor:
        return ops.deform_conv2d(
            exact.maps, exact.offset, exact.weight, None, (1, 1), (1, 1), mask=exact.mask
        )

    def plain() -> Tensor:
        return functional.conv2d(layer.maps, layer.weight, None, 1, 1)

    return take_turns(
        [
            _pass(ours, layer.leaves(), backward),
            _pass(torchvisions, exact.leaves(), backward),
            _pass(plain, [layer.maps, layer.weight], backward),
        ],
        repeats,
    )


def time_network(side: int, dtype: torch.dtype, repeats: int) -> list[float]:
    """Return milliseconds an image of a plain and a deformable ResNet-50-FPN, inference."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    contestants: list[Contestant] = []
    for deformable in (False, True):
        network = resnet_fpn_backbone(backbone_name="resnet50", weights=None).eval()
        if deformable:
            deform_stages(network.body)
            # Offsets of zero would be kinder to the cache than those of a trained network.
            for name, value in network.named_parameters():
                if name.endswith("offset_bias"):
                    torch.nn.init.normal_(value)
        network = network.to(memory_format=torch.channels_last)

        contestants.append(partial(_infer, network, image, dtype))
    return take_turns(contestants, repeats)


def _infer(network: torch.nn.Module, image: Tensor, dtype: torch.dtype) -> object:
    with torch.inference_mode(), torch.autocast("cpu", dtype, dtype != torch.float32):
        return network(image)


def take_turns(contestants: list[Contestant], repeats: int) -> list[float]:
    """Return each one's median milliseconds; they take turns, so that noise hits all alike."""
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(repeats + 1):
        for contestant, spent in zip(contestants, times, strict=True):
            begin = time.perf_counter()
            contestant()
            if turn:  # the first is to warm up
                spent.append(1000 * (time.perf_counter() - begin))
    return [statistics.median(spent) for spent in times]


def _pass(function: Callable[[], Tensor], leaves: list[Tensor], backward: bool) -> Contestant:
    def forward() -> object:
        with torch.no_grad():
            return function()

    def both() -> object:
        output = function()
        return torch.autograd.grad(output, leaves, torch.ones_like(output))

    return both if backward else forward


def _print_row(
    size: tuple[int, int, int], dtype: torch.dtype, backward: bool, times: list[float]
) -> None:
    ours, torchvisions, plain = times
    name = "x".join(str(value) for value in size)
    which = "both" if backward else "forward"
    print(
        f"{name:<12} {_name(dtype):<9} {which:<8} {ours:5.1f}  {torchvisions:11.1f}  {plain:5.1f}"
        f"  {torchvisions / ours:16.1f}  {ours / plain:10.2f}",
        flush=True,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    raise SystemExit(main())
