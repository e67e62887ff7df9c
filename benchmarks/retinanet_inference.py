"""Time a RetinaNet-R50-FPN on the CPU: python benchmarks/retinanet_inference.py [--run RUN --data DATA].

One 512 x 512 slice from pixels to boxes: torchvision's stock ``retinanet_resnet50_fpn`` (float32, P3 to P7,
four convolutions of 256 channels before each output) against ours with a ResNet-50 (P2 to P5, two of 64), in
float32 and in bfloat16. Both have random weights and take turns in one run; a figure is the ratio of the
medians. Target: at least 3 times as fast. The share of the processor's peak is our network's
multiplications in that time against those of a large matrix product of the same type, in the same run, by
the faster of torch's two libraries.

What bfloat16 costs in accuracy is measured with --run and --data: the same weights find lesions in the test
scans in both types.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import retinanet_resnet50_fpn

from medvision.datasets.discover import find_cases, load_case
from medvision.detector import load_detector
from medvision.device import Device, choose_device
from medvision.evaluation.case import CaseResult
from medvision.evaluation.froc import competition_metric, froc_curve, make_table, sensitivity_at
from medvision.evaluation.matching import match_centers
from medvision.models.config import RetinaNetConfig
from medvision.models.family import build_model, detect
from medvision.predict import find_lesions

N_SLICES = 7
CLASSES = 3
ANCHORS = (
    ((5.0, 5.0), (7.0, 7.0)),
    ((10.0, 10.0), (14.0, 14.0)),
    ((20.0, 20.0), (28.0, 28.0)),
    ((40.0, 40.0), (56.0, 56.0)),
)
PRECISIONS = ("float32", "bfloat16")
Contestant = Callable[[], object]


def main(arguments: list[str] | None = None) -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contestant")
    parser.add_argument("--side", type=int, default=512, help="rows and columns of the slice")
    parser.add_argument("--run", type=Path, help="trained run, for the accuracy of bfloat16")
    parser.add_argument("--data", type=Path, help="data set with labels, for the same")
    options = parser.parse_args(arguments)
    time_slices(options.side, options.repeats)
    if options.run and options.data:
        compare_precisions(options.run, options.data)
    return 0


def time_slices(side: int, repeats: int) -> None:
    """Print milliseconds a slice, the ratio to torchvision's, and the share of the peak."""
    torch.manual_seed(0)
    stock = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=1 + CLASSES, min_size=side, max_size=side
    ).eval()
    ours = our_network()
    images = torch.rand(1, N_SLICES, side, side).contiguous(memory_format=torch.channels_last)
    devices = [choose_device("cpu", precision) for precision in PRECISIONS]
    contestants: list[Contestant] = [partial(infer_stock, stock, torch.rand(3, side, side))]
    contestants += [partial(infer, ours, images, device) for device in devices]
    products = [partial(multiply, *matrices(device)) for device in devices]
    products += [partial(convolve, *convolution(device)) for device in devices]
    times = take_turns([*contestants, *products], repeats)
    stock_ms, our_ms = times[0], times[1:3]
    product_ms = [min(pair) for pair in zip(times[3:5], times[5:], strict=True)]
    with FlopCounterMode(display=False) as counter:
        infer(ours, images, devices[0])
    work = counter.get_total_flops()
    print(f"{torch.get_num_threads()} threads, medians of {repeats}, {side} x {side} pixels")
    print(f"torchvision retinanet_resnet50_fpn  float32   {stock_ms:7.0f} ms")
    for precision, ms, product in zip(PRECISIONS, our_ms, product_ms, strict=True):
        share = (work / ms) / (2 * MATRIX**3 / product)
        print(
            f"medvision RetinaNet, ResNet-50      {precision:9} {ms:7.0f} ms  "
            f"{stock_ms / ms:.1f} times as fast, {share:.0%} of the matrix product's speed"
        )
    print(f"ours multiplies and adds {work / 2e9:.1f} billion times a slice")


def our_network() -> nn.Module:
    """Return ours with a ResNet-50 as published, random weights."""
    config = RetinaNetConfig(backbone="resnet50", stem_pooling=True, anchor_sizes=ANCHORS)
    network = build_model(config, N_SLICES, CLASSES).eval()
    return network.to(memory_format=torch.channels_last)


@torch.inference_mode()
def infer_stock(network: nn.Module, image: Tensor) -> object:
    """Take ``[3, row, column]`` to boxes as torchvision does."""
    return network([image])


@torch.inference_mode()
def infer(network: nn.Module, images: Tensor, device: Device) -> object:
    """Take ``[batch, slice, row, column]`` to boxes as medvision does, without mirror images."""
    with device.autocast():
        return detect(
            network, images, flips=False, score_thresh=0.05, nms_thresh=0.3, detections_per_img=100
        )


MATRIX = 2048


def matrices(device: Device) -> tuple[Tensor, Tensor]:
    """Return two square matrices in the type that the device computes in."""
    first, second = torch.randn(2, MATRIX, MATRIX).to(device.compute_dtype)
    return first, second


def multiply(first: Tensor, second: Tensor) -> object:
    """Return the matrix product."""
    return first @ second


def convolution(device: Device) -> tuple[Tensor, Tensor]:
    """Return an image and the weights of a 1 x 1 convolution that multiply like those matrices."""
    first, second = matrices(device)
    image = first.T.reshape(1, MATRIX, 32, MATRIX // 32)
    return image.contiguous(memory_format=torch.channels_last), second.T[:, :, None, None]


@torch.inference_mode()
def convolve(image: Tensor, weights: Tensor) -> object:
    """Return the same product as :func:`multiply`, by the library of convolutions.

    In float32 torch multiplies matrices with MKL, which on an AMD is the slower of the two.
    """
    return functional.conv2d(image, weights)


def take_turns(contestants: list[Contestant], repeats: int) -> list[float]:
    """Return each contestant's median milliseconds, after one round that does not count."""
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(repeats + 1):
        for contestant, own in zip(contestants, times, strict=True):
            started = time.perf_counter()
            contestant()
            if turn:
                own.append((time.perf_counter() - started) * 1000)
    return [statistics.median(own) for own in times]


def compare_precisions(run: Path, data: Path) -> None:
    """Print what the same weights find in both types, without mirror images."""
    network, config, _ = load_detector(run)
    network = network.to(memory_format=torch.channels_last)
    plain = config.predict.plain()
    config = config.model_copy(update={"predict": plain})
    cases = [load_case(case) for case in find_cases(data).cases]
    for precision in PRECISIONS:
        device = choose_device("cpu", precision)
        results = []
        for case in cases:
            volume = case.volume
            found = find_lesions(volume, network, config, device)
            name = case.case.case_id
            results.append(CaseResult(name, found, case.annotations, volume.affine, volume.shape))
        curve = froc_curve(make_table([match_centers(result) for result in results]))
        at_one = float(sensitivity_at(curve, [1.0])[0])
        print(
            f"{run.name} in {precision}: sensitivity at 1 false positive per scan {at_one:.3f}, "
            f"CPM {competition_metric(curve):.3f} ({len(cases)} scans)"
        )


if __name__ == "__main__":
    raise SystemExit(main())
