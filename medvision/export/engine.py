"""Predict with an exported model: ONNX Runtime in place of the network, everything else as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medvision.detector import DetectorConfig, with_score_thresh
from medvision.device import Device
from medvision.errors import InputError, UsageError, first_line, ran_out_of_memory
from medvision.export.files import ENGINE_PACKAGES, INPUT_NAME, find_exported, require_packages
from medvision.export.outputs import KINDS, GraphOutputs
from medvision.models.anchors import level_anchors
from medvision.models.faster_rcnn import FasterRCNN
from medvision.models.retinanet import RawDetections, RetinaNet
from medvision.models.unet import RawSegmentation, UNet
from medvision.predict import Predictor

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxPredictor(Predictor):
    """Finds lesions with an exported model; the findings are those of the run in float32.

    >>> findings = OnnxPredictor(Path("runs/nodules"))(read_scan("data/series"))  # doctest: +SKIP
    """

    def __init__(self, run: Path, device: str = "auto", score_thresh: float | None = None) -> None:
        """Load ``run/model.onnx``, or ``run`` itself if it is a file; ``score_thresh`` as in Predictor."""
        require_packages(ENGINE_PACKAGES, "--engine onnx")
        file, exported = find_exported(Path(run))
        session = OnnxSession(file, device)
        # Boxes are selected on the processor whatever computed them.
        self.device = Device(torch.device("cpu"), torch.float32)
        self.config = with_score_thresh(exported.detector, score_thresh)
        self.network = STAND_INS[KINDS[self.config.model.name]](session, self.config)
        self.about = {**exported.about, "engine": session.name}


class OnnxSession:
    """An ONNX file that is ready to run."""

    def __init__(self, file: Path, device: str = "cpu") -> None:
        """Load ``file`` for a device: auto, cpu, cuda or cuda:N."""
        import onnxruntime

        providers = _providers(device, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only: warnings go to stderr, past our log
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers)
        except Exception as error:  # its exceptions share no base class
            if ran_out_of_memory(error):
                raise
            raise InputError(
                "ONNX Runtime cannot load the file.",
                where=file,
                why=first_line(error),
                do="Export it again with medvision export --format onnx.",
            ) from error
        self.outputs = [output.name for output in self._session.get_outputs()]
        self.name = f"onnxruntime {onnxruntime.__version__}"

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Take ``[batch, slice, row, column]`` to the outputs by name."""
        batch: NDArray[np.float32] = np.ascontiguousarray(images.float().cpu().numpy())
        values = self._session.run(self.outputs, {INPUT_NAME: batch})
        return {
            name: torch.from_numpy(value) for name, value in zip(self.outputs, values, strict=True)
        }


class OnnxRetinaNet(RetinaNet):
    """Stands in for a one-stage network: the same call, the same raw detections."""

    def __init__(self, session: OnnxSession, config: DetectorConfig) -> None:
        nn.Module.__init__(self)  # it has no parts of its own
        self.session = session
        self.strides = list(config.model.strides)
        sizes = config.model.anchor_sizes  # type: ignore[union-attr]  # only models with anchors come here
        self.shapes = [torch.tensor(shapes) for shapes in sizes]

    def forward(self, images: Tensor) -> RawDetections:
        """Take ``[batch, slice, row, column]`` in 0..1 to raw detections."""
        rows, columns = images.shape[-2:]
        # Mirror images are put back level by level, for which the anchors of each are counted.
        anchors = [
            level_anchors((rows // stride, columns // stride), stride, shapes)
            for stride, shapes in zip(self.strides, self.shapes, strict=True)
        ]
        return RawDetections(**self.session(images), anchors=anchors)


class OnnxFasterRCNN(FasterRCNN):
    """Stands in for a two-stage network; its graph takes one slice, and selects boxes itself."""

    def __init__(self, session: OnnxSession, config: DetectorConfig) -> None:
        nn.Module.__init__(self)
        self.session = session
        self.outputs = GraphOutputs(config)

    def forward(self, images: Tensor, targets: Any = None) -> Any:
        """Take ``[batch, slice, row, column]`` in 0..1 to the boxes of each slice."""
        return [self.outputs.read(self.session(image)) for image in images.split(1)]

    def select(self, raw: Any, **thresholds: float) -> Any:
        """Return what the graph selected, by the thresholds of the settings that it was exported with."""
        return raw


class OnnxUNet(UNet):
    """Stands in for a segmentation network."""

    def __init__(self, session: OnnxSession, config: DetectorConfig) -> None:
        nn.Module.__init__(self)
        self.session = session

    def forward(self, images: Tensor) -> RawSegmentation:
        """Take ``[batch, slice, row, column]`` in 0..1 to logits of every pixel."""
        return RawSegmentation(self.session(images)["logits"], ())


STAND_INS: dict[str, Callable[[OnnxSession, DetectorConfig], nn.Module]] = {
    "one-stage": OnnxRetinaNet,
    "two-stage": OnnxFasterRCNN,
    "segmentation": OnnxUNet,
}


def _providers(device: str, available: list[str]) -> list[Any]:
    """Return the execution providers for a device; UsageError if ONNX Runtime has none for it."""
    if device == "cpu" or (device == "auto" and _CUDA not in available):
        return [_CPU]
    if device == "auto" or device.startswith("cuda"):
        if _CUDA not in available:
            raise UsageError(
                f"Device {device!r} is not there: ONNX Runtime was installed without CUDA.",
                do="Use --device cpu, or run: python -m pip install onnxruntime-gpu",
            )
        number = int(device.partition(":")[2] or 0)
        return [(_CUDA, {"device_id": number}), _CPU]
    raise UsageError(f"ONNX Runtime runs on cpu or cuda; got {device!r}.", do="Use --device cpu.")
