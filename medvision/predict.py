"""The whole story of one scan: volume, slice stacks, detections, findings. Read this first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medvision.detector import DetectorConfig, load_detector, with_score_thresh
from medvision.device import Device, choose_device
from medvision.errors import InputError
from medvision.findings.assemble import make_finding
from medvision.findings.components import ProbabilityVolume, find_components_as_findings
from medvision.findings.config import PredictConfig
from medvision.findings.finding import Finding, ScanFindings
from medvision.findings.fuse import fuse_looks
from medvision.findings.merge import SliceDetections, link_slices
from medvision.findings.outline import Outline
from medvision.geometry import Box
from medvision.models.family import detect, segment
from medvision.progress import Progress, ProgressCallback, ignore_progress
from medvision.scans.volume import Volume
from medvision.stacks.crops import body_box, crop_padded
from medvision.stacks.resample import resample_inplane
from medvision.stacks.slice_stack import slice_stack, stack_offsets
from medvision.stacks.window import apply_window, window_limits


class Predictor:
    """Finds lesions in volumes with a trained run.

    >>> findings = Predictor(Path("runs/nodules"))(read_scan("data/series"))  # doctest: +SKIP
    """

    def __init__(self, run: Path, device: str = "auto", score_thresh: float | None = None) -> None:
        """Load a run folder; ``score_thresh`` overrides the run's lowest score of a finding, 0..1."""
        self.device = choose_device(device)
        network, config, self.about = load_detector(Path(run))
        self.config = with_score_thresh(config, score_thresh)
        self.network = network.to(self.device.torch_device).to(memory_format=torch.channels_last)

    def __call__(
        self,
        volume: Volume,
        case_id: str | None = None,
        on_progress: ProgressCallback = ignore_progress,
    ) -> ScanFindings:
        """Return what is found in a volume, in its own grid. Raises InputError for another modality."""
        self._check_modality(volume)
        found = find_lesions(volume, self.network, self.config, self.device, on_progress)
        thresh = self.config.predict.score_thresh
        source = volume.source
        return ScanFindings(
            case_id=case_id or source.series_instance_uid or "scan",
            shape=volume.shape,
            affine=volume.affine,
            findings=tuple(finding for finding in found if finding.score >= thresh),
            candidates=tuple(finding for finding in found if finding.score < thresh),
            score_thresh=thresh,
            class_names=self.config.class_names,
            modality=source.modality,
            study_instance_uid=source.study_instance_uid,
            series_instance_uid=source.series_instance_uid,
            frame_of_reference_uid=source.frame_of_reference_uid,
            notes=volume.notes,
            model=self.about,
        )

    def _check_modality(self, volume: Volume) -> None:
        known, given = self.config.modality, volume.source.modality
        if known and given and known != given:
            raise InputError(
                f"The scan must be {known}, as the training scans were; it is {given}.",
                where=volume.source.path,
                do=f"Give a {known} series, or train a run on {given}.",
            )


def find_lesions(
    volume: Volume,
    network: nn.Module,
    config: DetectorConfig,
    device: Device,
    on_progress: ProgressCallback = ignore_progress,
) -> tuple[Finding, ...]:
    """Return findings and candidates by falling score, boxes in the volume's own voxel edges."""
    lowest = min(config.predict.candidate_thresh, config.predict.score_thresh)
    if config.model.name == "unet":
        seen = resample_inplane(volume, config.pixel_mm)
        window = body_box(seen.array, volume.source.modality or config.modality)
        return find_components_as_findings(
            segment_slices(seen, window, network, config, device, on_progress),
            config.predict.components,
            config.class_names,
            volume.shape,
            volume.affine,
            lowest_score=lowest,
            most=config.predict.findings_per_scan,
        )
    detections = detect_at_scales(volume, network, config, device, on_progress)
    depth = score_depth(volume, config.predict)
    lesions = link_slices(detections, config.predict, depth)[: config.predict.findings_per_scan]
    kept = [lesion for lesion in lesions if lesion.score >= lowest]
    return tuple(
        make_finding(number, lesion, detections, config.class_names, volume.shape, volume.affine)
        for number, lesion in enumerate(kept, start=1)
    )


def detect_at_scales(
    volume: Volume,
    network: nn.Module,
    config: DetectorConfig,
    device: Device,
    on_progress: ProgressCallback = ignore_progress,
) -> SliceDetections:
    """Run the network over a volume in each of the pixel sizes ``predict.scales``; boxes in its own pixels.

    A lesion is one at any size, what only resembles one at a single size is not: the fused score tells them
    apart. Mirror images are averaged at the first size alone, the others would cost four times as much.

    A look that magnifies has no vote on boxes that are larger in it than the lesions of training usually were:
    it would see parts of them, and lose the largest lesions for it.
    """
    settings, looks = config.predict, []
    for number, scale in enumerate(settings.scales):
        seen = resample_inplane(volume, config.pixel_mm * scale)
        window = body_box(seen.array, volume.source.modality or config.modality)
        own = settings.model_copy(update={"flips": settings.flips and number == 0})
        found = detect_slices(
            seen,
            window,
            network,
            config.model_copy(update={"predict": own}),
            device,
            _counted_on(on_progress, number, len(settings.scales)),
        )
        height, width = (volume.shape[axis] / seen.shape[axis] for axis in (1, 2))
        looks.append(found.scaled(height, width))
    largest = [_largest_box(volume, config, scale) for scale in settings.scales]
    return fuse_looks(looks, settings.nms_thresh, settings.box_score_thresh, largest)


def _largest_box(volume: Volume, config: DetectorConfig, scale: float) -> tuple[float, float]:
    """Return the width and height, in pixels of ``volume``, on which a look in pixels of ``scale`` votes."""
    # A look in the pixels of training always votes, or the coarsest if all of them magnify.
    if config.usual_lesion_mm is None or scale >= min(1.0, max(config.predict.scales)):
        return inf, inf
    _, rows_mm, columns_mm = volume.spacing_mm
    side_mm = config.usual_lesion_mm * scale
    return side_mm / columns_mm, side_mm / rows_mm


def _counted_on(on_progress: ProgressCallback, number: int, looks: int) -> ProgressCallback:
    """Return a callback that counts look ``number`` at each slice as a part of all ``looks``."""
    if looks == 1:
        return on_progress

    def report(progress: Progress) -> None:
        done = progress.done + number * progress.total
        total = looks * progress.total
        on_progress(replace(progress, done=done, total=total, unit="looks at slices"))

    return report


def score_depth(volume: Volume, config: PredictConfig) -> int:
    """Return over how many slices a finding's score is averaged; never more than there are."""
    return min(max(1, round(config.score_depth_mm / volume.spacing_mm[0])), volume.shape[0])


@torch.inference_mode()
def detect_slices(
    volume: Volume,
    window: Box,
    network: nn.Module,
    config: DetectorConfig,
    device: Device,
    on_progress: ProgressCallback = ignore_progress,
    every: int = 1,
) -> SliceDetections:
    """Run the network over ``window`` on every n-th slice; boxes in pixel edges of ``volume``."""
    network.eval()
    top, left = int(window.row_min), int(window.column_min)
    corner = np.array([left, top, left, top])
    slices, boxes, scores, probabilities = [], [], [], []
    outlines: list[Outline] = []
    settings = config.predict
    planes = range(0, volume.shape[0], every)
    for numbers, batch in stack_batches(volume, window, planes, config):
        images = torch.from_numpy(batch).to(device.torch_device, memory_format=torch.channels_last)
        with device.autocast():
            selected = detect(
                network,
                images,
                flips=settings.flips,
                score_thresh=settings.box_score_thresh,
                nms_thresh=settings.nms_thresh,
                detections_per_img=settings.detections_per_img,
            )
        for index, found in zip(numbers, selected, strict=True):
            slices.append(np.full(len(found["scores"]), index, dtype=np.int64))
            boxes.append(found["boxes"].cpu().double().numpy() + corner)
            scores.append(found["scores"].cpu().double().numpy())
            probabilities.append(found["class_probabilities"].cpu().double().numpy())
            if "masks" in found:
                outlines += _outlines(found["boxes"], found["masks"], top, left)
        on_progress(Progress("predict", numbers[-1] + 1, volume.shape[0], "slices"))
    return SliceDetections(
        np.concatenate(slices),
        np.concatenate(boxes),
        np.concatenate(scores),
        np.concatenate(probabilities),
        tuple(outlines),
    )


def _outlines(boxes: Tensor, masks: Tensor, top: int, left: int) -> Iterator[Outline]:
    """Cut each mask ``[row, column]`` of a window at (``top``, ``left``) to its box."""
    for box, mask in zip(boxes.cpu().numpy(), masks.cpu().numpy(), strict=True):
        x1, y1 = np.floor(box[:2]).clip(0).astype(int)
        x2, y2 = np.ceil(box[2:]).clip(0).astype(int)
        yield Outline(mask[y1:y2, x1:x2], float(y1 + top), float(x1 + left))


@torch.inference_mode()
def segment_slices(
    volume: Volume,
    window: Box,
    network: nn.Module,
    config: DetectorConfig,
    device: Device,
    on_progress: ProgressCallback = ignore_progress,
) -> ProbabilityVolume:
    """Run a segmentation network over all slices of ``window``."""
    network.eval()
    slices, rows, columns = (axis.stop - axis.start for axis in window.slices)
    lesion = np.zeros((slices, rows, columns), dtype=np.float32)
    # Half the memory is enough for what only decides which class is likeliest.
    classes = np.zeros((len(config.class_names), slices, rows, columns), dtype=np.float16)
    for numbers, batch in stack_batches(volume, window, range(slices), config):
        images = torch.from_numpy(batch).to(device.torch_device, memory_format=torch.channels_last)
        with device.autocast():
            probabilities = segment(network, images, flips=config.predict.flips)
        found = probabilities[:, :, :rows, :columns].cpu().numpy()
        lesion[numbers] = 1 - found[:, 0]
        classes[:, numbers] = found[:, 1:].swapaxes(0, 1)
        on_progress(Progress("predict", numbers[-1] + 1, slices, "slices"))
    corner = (int(window.row_min), int(window.column_min))
    return ProbabilityVolume(lesion, classes, corner, volume.shape[1:])


def stack_batches(
    volume: Volume, window: Box, planes: Sequence[int], config: DetectorConfig
) -> Iterator[tuple[Sequence[int], NDArray[np.float32]]]:
    """Yield numbers of the slices ``planes`` and their ``[batch, channel, row, column]`` in 0..1.

    Rows and columns are padded to multiples of the model's coarsest stride.
    """
    stride = config.model.strides[-1]
    limits = window_limits(volume.array, config.stack.window_hu)
    spacing = volume.spacing_mm[0]
    offsets = stack_offsets(config.stack.n_slices, config.stack.slice_offset_mm, spacing)
    cropped = volume.array[window.slices]
    size = tuple(-(-length // stride) * stride for length in cropped.shape[1:])
    for first in range(0, len(planes), config.predict.batch_size):
        numbers = planes[first : first + config.predict.batch_size]
        stacks = [apply_window(slice_stack(cropped, index, offsets), limits) for index in numbers]
        yield numbers, crop_padded(np.stack(stacks), 0, 0, (size[0], size[1]), 0.0)
