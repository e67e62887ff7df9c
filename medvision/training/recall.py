"""How many held-out lesions the first stage of a two-stage model proposes: the rest it can never find."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medvision.detector import DetectorConfig
from medvision.device import Device
from medvision.geometry import Box
from medvision.models.faster_rcnn import FasterRCNN
from medvision.models.proposals import ProposalRecall, proposal_recall
from medvision.predict import stack_batches
from medvision.stacks.crops import body_box
from medvision.training.cache import CachedCase

ALL = "all"


@torch.inference_mode()
def measure_proposals(
    network: FasterRCNN, config: DetectorConfig, cases: list[CachedCase], device: Device
) -> dict[str, ProposalRecall]:
    """Count the lesions' boxes that a proposal covers, slice by slice, for "all" and for each class.

    A box is covered by an IoU of ``regions.foreground_iou``: from there on the second stage learns to call
    a proposal a lesion. Proposals are those that prediction looks at; only slices with lesions count.
    """
    network.eval()
    total = dict.fromkeys((ALL, *config.class_names), ProposalRecall(0, 0))
    for case in cases:
        volume = case.volume
        window = body_box(volume.array, volume.source.modality or config.modality)
        truth = _boxes_by_slice(case, window)
        for numbers, batch in stack_batches(volume, window, sorted(truth), config):
            images = torch.from_numpy(batch).to(device.torch_device)
            with device.autocast():
                proposals = network(images.contiguous(memory_format=torch.channels_last)).regions
            for number, boxes in zip(numbers, proposals, strict=True):
                for name, wanted in truth[number]:
                    found = proposal_recall(
                        [boxes.cpu()], [wanted], network.config.regions.foreground_iou
                    )
                    for key in {ALL, name} & total.keys():
                        total[key] = total[key].plus(found)
    return total


def _boxes_by_slice(case: CachedCase, window: Box) -> dict[int, list[tuple[str, Tensor]]]:
    """Return class and box ``[1, 4]`` in pixels of ``window``, of the lesions that count, slice by slice."""
    corner = np.array([window.column_min, window.row_min] * 2)
    found: dict[int, list[tuple[str, Tensor]]] = {}
    for lesion in case.slice_boxes():
        box = torch.tensor(lesion.box - corner, dtype=torch.float32)[None]
        found.setdefault(lesion.slice_index, []).append((lesion.class_name, box))
    return found
