"""What training a segmentation minimises: losses of all outputs against the classes of the pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medvision.models.segmentation_losses import (
    SegmentationTarget,
    SegmentationTruth,
    added_weights,
    segmentation_losses,
)
from medvision.models.unet import RawSegmentation
from medvision.models.unet_blocks import center_crop
from medvision.models.unet_config import UNetConfig


class SegmentationCriterion(nn.Module):
    """The configured sum of losses on the output, and a share of it on every coarser one.

    Deep supervision: Lee et al., Deeply-Supervised Nets, AISTATS 2015. The weights of the outputs are
    scaled to sum to 1, as in nnU-Net (Isensee et al., Nature Methods 2021).
    """

    def __init__(self, config: UNetConfig, class_weights: Tensor) -> None:
        """Take the weights ``[classes]`` of the lesion classes; the background's is in ``config.loss``."""
        super().__init__()
        self.config = config
        background = class_weights.new_tensor([config.loss.background_weight])
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.cat((background, class_weights)))

    def forward(
        self, raw: RawSegmentation, targets: Sequence[SegmentationTarget]
    ) -> dict[str, Tensor]:
        """Return the weighted losses by name. Targets larger than the output count in their middle."""
        truth = self._truth(raw, targets)
        outputs = [raw.logits, *raw.auxiliary]
        weights = [1.0, *self.config.deep_supervision][: len(outputs)]
        total: dict[str, Tensor] = {}
        for weight, logits in zip(weights, outputs, strict=True):
            for name, loss in segmentation_losses(logits, truth, self.config.loss).items():
                share = loss * (weight / sum(weights))
                total[name] = total[name] + share if name in total else share
        return total

    def _truth(
        self, raw: RawSegmentation, targets: Sequence[SegmentationTarget]
    ) -> SegmentationTruth:
        size = (raw.logits.shape[-2], raw.logits.shape[-1])
        class_map = torch.stack([target["class_map"] for target in targets])
        added = added_weights(targets)
        cropped = None if added is None else center_crop(added, size)
        return SegmentationTruth(center_crop(class_map, size), self.class_weights, cropped)
