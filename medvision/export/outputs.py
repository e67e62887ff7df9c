"""What a graph gives for each kind of model: plain tensors with names, as graphs have no records."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from medvision.detector import DetectorConfig
from medvision.export.two_stage import FixedLengths
from medvision.models.faster_rcnn import FasterRCNN

LAYOUTS: dict[str, dict[str, str]] = {
    "one-stage": {
        "lesion_logits": "[batch, anchor]: is it a lesion; sigmoid gives the score",
        "class_logits": "[batch, anchor, class]: of which class, if it is one; softmax over class",
        "boxes": "[batch, anchor, 4]: x1, y1, x2, y2 in pixels of the input",
        "segmentation_logits": "[batch, 1 + class, row, column]: background first; softmax over class",
    },
    "two-stage": {
        "boxes": "[box, 4]: x1, y1, x2, y2 in pixels of the input, by falling score",
        "scores": "[box]: is it a lesion, 0..1; -1 where there is no further box",
        "class_probabilities": "[box, class], rows sum to 1: of which class, if it is one",
        "masks": "[box, row, column], true inside the outline, in pixels of the input",
    },
    "segmentation": {
        "logits": "[batch, 1 + class, row, column]: background first; softmax over class",
    },
}
"""Names and layouts by kind of model. Anchors are none of them: boxes are decoded already."""

KINDS = {
    "retinanet": "one-stage",
    "retina-unet": "one-stage",
    "faster-rcnn": "two-stage",
    "mask-rcnn": "two-stage",
    "unet": "segmentation",
}


class GraphOutputs:
    """Takes what a network gives to the plain outputs of its graph.

    A graph of a two-stage model takes one slice at a time (``single``), as each has another number of
    boxes, and the thresholds of ``config.predict`` are part of it.
    """

    def __init__(self, config: DetectorConfig) -> None:
        self.kind = KINDS[config.model.name]
        self.layouts = LAYOUTS[self.kind]
        self.single = self.kind == "two-stage"
        settings = config.predict
        self.thresholds: dict[str, Any] = {
            "score_thresh": settings.box_score_thresh,
            "nms_thresh": settings.nms_thresh,
            "detections_per_img": settings.detections_per_img,
        }

    def of(self, network: Any, raw: Any) -> list[dict[str, Tensor]]:
        """Return the outputs by name: one table for the batch, or one for each slice if ``single``."""
        if self.single:
            found = network.select(raw, **self.thresholds)
            return [self._named(item.get) for item in found]
        return [self._named(lambda name: getattr(raw, name, None))]

    def read(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a graph gave without the entries that only fill its lists up."""
        if not self.single:
            return found
        boxes = found["scores"] >= 0
        return {name: value[boxes] for name, value in found.items()}

    def _named(self, get: Any) -> dict[str, Tensor]:
        values = {name: get(name) for name in self.layouts}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class PlainOutputs(nn.Module):
    """Gives a network's outputs as a plain tuple of tensors, which is what graphs have."""

    def __init__(self, network: nn.Module, outputs: GraphOutputs) -> None:
        super().__init__()
        self.network = network
        self.outputs = outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Take ``[batch, slice, row, column]`` to the outputs in the order of their names."""
        return tuple(self.outputs.of(self.network, self.network(images))[0].values())


def graph_module(network: nn.Module, outputs: GraphOutputs) -> nn.Module:
    """Return what is exported in place of ``network``: the same function in the form of a graph."""
    if isinstance(network, FasterRCNN):
        return FixedLengths(network, **outputs.thresholds).eval()
    return PlainOutputs(network, outputs).eval()
