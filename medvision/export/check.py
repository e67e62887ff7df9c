"""Whether an exported graph gives the network's own outputs, on slices as predict would cut them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medvision.detector import DetectorConfig
from medvision.device import Device
from medvision.errors import InputError
from medvision.export.files import ExportCheck
from medvision.export.outputs import GraphOutputs
from medvision.geometry import Box, make_affine
from medvision.predict import detect_slices, segment_slices
from medvision.sample_data.phantoms import make_phantom
from medvision.scans.load import read_scan
from medvision.scans.volume import ScanSource, Volume
from medvision.stacks.crops import body_box
from medvision.stacks.resample import resample_inplane

TOLERANCE = 1e-4
"""Largest difference of an output: absolute up to 1, relative above (boxes go to hundreds of pixels)."""

_SLICES = 4
_CASES = 2

Runner = Callable[[Tensor], dict[str, Tensor]]
"""Takes ``[batch, slice, row, column]`` to the outputs of a graph by name."""


def largest_difference(expected: Tensor, found: Tensor, *, boxes: bool = False) -> float:
    """Return the largest difference of two tensors, relative where ``expected`` is above 1.

    Of ``boxes`` it is relative to the largest of a box's four coordinates: they are centre plus and
    minus half the size, and a side near 0 has the rounding of both. Of masks it is the share of
    pixels. Infinite if the shapes differ, or if a value is not finite.
    """
    if expected.shape != found.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    if expected.dtype == torch.bool:
        # A pixel of a mask may lie on the threshold; of many, few do.
        return (found.bool() != expected).double().mean().item()
    size = expected.double().abs()
    size = size.amax(dim=-1, keepdim=True) if boxes else size
    gap = (found.double() - expected.double()).abs() / size.clamp(min=1)
    return gap.max().item() if torch.isfinite(gap).all() else float("inf")


@dataclass
class Comparison:
    """The largest difference of a graph's outputs from the network's, over all slices seen so far."""

    outputs: GraphOutputs
    exported: Runner
    largest: float = 0.0
    slices: int = 0
    sizes: dict[tuple[int, int], None] = field(default_factory=dict)

    def __call__(self, network: nn.Module, inputs: tuple[Tensor, ...], raw: Any) -> None:
        """Be a forward hook of the network: give the graph what the network was given, and compare."""
        images = inputs[0]
        parts = images.split(1) if self.outputs.single else [images]
        for part, expected in zip(parts, self.outputs.of(network, raw), strict=True):
            found = self.outputs.read(self.exported(part))
            for name, value in expected.items():
                gap = largest_difference(value, found[name], boxes=name == "boxes")
                self.largest = max(self.largest, gap)
        self.slices += len(images)
        self.sizes[(images.shape[-2], images.shape[-1])] = None


def compare(
    network: nn.Module,
    exported: Runner,
    config: DetectorConfig,
    source: str,
    volumes: list[Volume],
) -> ExportCheck:
    """Run both on the middle slices of each volume, in two sizes and two sizes of batch, as predict would.

    Raises InputError if an output differs by more than ``TOLERANCE``.
    """
    plain = config.predict.plain(batch_size=_SLICES - 1)
    config = config.model_copy(update={"predict": plain})
    device = Device(torch.device("cpu"), torch.float32)
    seen = Comparison(GraphOutputs(config), exported)
    predict = segment_slices if config.model.name == "unet" else detect_slices
    hook = network.register_forward_hook(seen)
    try:
        for volume in map(_middle_slices, volumes):
            for window in _windows(volume, config.modality):
                predict(volume, window, network, config, device)
    finally:
        hook.remove()
    if not seen.largest <= TOLERANCE:
        raise InputError(
            "The exported model does not give the network's own outputs; it was not kept.",
            where=source,
            why=f"The largest difference is {seen.largest:.2g}; {TOLERANCE:g} is allowed.",
            do="Export in another format, or update torch and onnxruntime.",
        )
    return ExportCheck(
        source=source,
        slices=seen.slices,
        sizes=tuple(seen.sizes),
        largest_difference=seen.largest,
        tolerance=TOLERANCE,
    )


def _middle_slices(volume: Volume) -> Volume:
    slices, rows, columns = volume.shape
    first = max(0, (slices - _SLICES) // 2)
    return volume.crop(Box(first, 0, 0, min(slices, first + _SLICES), rows, columns))


def _windows(volume: Volume, modality: str) -> Iterator[Box]:
    """Yield the window that predict would take, and a small one of another shape in it."""
    whole = body_box(volume.array, volume.source.modality or modality)
    rows, columns = whole.row_max - whole.row_min, whole.column_max - whole.column_min
    yield whole
    top, left = whole.row_min + rows // 4, whole.column_min + columns // 4
    yield Box(0, top, left, volume.shape[0], top + max(1, rows // 2), left + max(1, columns // 3))


def check_volumes(
    run: Path, config: DetectorConfig, check: Path | None
) -> tuple[str, list[Volume]]:
    """Return the scans to compare on, at the network's pixel size, and in words what they are."""
    if check is not None:
        volume = resample_inplane(read_scan(check), config.pixel_mm)
        return f"the scan {check}", [volume]
    cached = sorted((run / "cache").glob("*.scan.npy"))[:_CASES]
    if cached:
        names = ", ".join(path.name.removesuffix(".scan.npy") for path in cached)
        return f"the run's cached training scans {names}", [
            _cached(path, config) for path in cached
        ]
    phantom = make_phantom().volume
    return "a computed phantom, as no real scan was at hand", [phantom]


def _cached(path: Path, config: DetectorConfig) -> Volume:
    """Map a cached scan. Slice spacing is not kept there: neighbours are taken as the stack's."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    spacing = (config.stack.slice_offset_mm, config.pixel_mm, config.pixel_mm)
    affine = make_affine([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], spacing)
    return Volume(array, affine, ScanSource(modality=config.modality))
