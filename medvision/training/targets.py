"""What is true of a crop: its label map, and the boxes, outlines and classes that it means."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvision.geometry import Box
from medvision.models.criterion import Target
from medvision.stacks.augment import boxes_from_labels
from medvision.training.segmentation_target import (
    BACKGROUND,
    IGNORED,
    border_weights,
    make_class_map,
)

_MOST_LABELS = 254
"""Lesions that a crop's 8-bit label map keeps apart, one value left for one that is pasted."""


class CropLabel(NamedTuple):
    """What a value of a crop's label map stands for; class None: to be ignored.

    ``area`` is that of the lesion on the whole slice, in pixels; ``whole`` tells that all of it is in the
    crop as cut. ``outlined`` tells that its outline is known: of a lesion known by its box alone the label
    map holds an ellipse in its place, for the box.
    """

    class_index: int | None
    area: int = 0
    whole: bool = False
    outlined: bool = True


def enter_label(
    crop: NDArray[np.uint8], table: list[CropLabel], mask: NDArray[np.bool_], entry: CropLabel
) -> None:
    """Draw a lesion into the crop's label map with a value of its own, if any of it is in the crop.

    Where the values run out, the last one stands for all further lesions, to be ignored.
    """
    if not mask.any():
        return
    if len(table) < _MOST_LABELS:
        table.append(entry)
    else:
        table[-1] = CropLabel(None, outlined=table[-1].outlined and entry.outlined)
    crop[mask] = len(table)


def unsure_region(boxes: list[Box], top: int, left: int, size: int) -> NDArray[np.bool_]:
    """Return ``[size, size]``: where a crop cut at row ``top``, column ``left`` shows some of ``boxes``.

    Of lesions whose outline is not known it holds every pixel that may be theirs, which the ellipse does not.
    """
    region = np.zeros((size, size), dtype=bool)
    for box in boxes:
        _, rows, columns = box.slices
        region[
            max(0, rows.start - top) : max(0, rows.stop - top),
            max(0, columns.start - left) : max(0, columns.stop - left),
        ] = True
    return region


def _visible(
    labels: NDArray[np.uint8], value: int, box: tuple[int, int, int, int], entry: CropLabel
) -> float:
    """Return the share of a lesion that the augmented crop shows.

    One that the crop's edge does not cut is all there, however the zoom changed its area.
    """
    rows, columns = labels.shape
    if entry.whole and min(box[:2]) > 0 and box[2] < columns and box[3] < rows:
        return 1.0
    return float((labels == value).sum()) / max(1, entry.area)


class OutlineTargets(NamedTuple):
    """Asks for outlines and class maps, and weighs borders as these two of SegmentationLossConfig say."""

    border_weight: float
    border_sigma: float


class TrainingTarget(Target, total=False):
    """The truth of a crop, with what models that draw outlines are trained from."""

    masks: Tensor  # [n, row, column] bool, one for each box; empty where the outline is not known
    class_map: Tensor  # [row, column], 0 background, 1.. classes, 255 ignored
    added_weights: Tensor  # [row, column], where the losses of a segmentation weigh borders


def make_target(
    labels: NDArray[np.uint8],
    table: list[CropLabel],
    least_visible: float,
    outlines: OutlineTargets | None = None,
    unsure: NDArray[np.bool_] | None = None,
) -> TrainingTarget:
    """Return the target of an augmented crop ``labels[row, column]``; value n is ``table[n - 1]``.

    Lesions of which less than the share ``least_visible`` is in the crop are to be ignored. With
    ``outlines`` the target has ``masks`` and ``class_map`` too, and ``added_weights`` if borders have a weight.
    ``unsure[row, column]`` is where lesions without a known outline may be: no background there.
    """
    boxes, ignored = [], []
    counted: dict[int, int] = {}
    for value, box in boxes_from_labels(labels).items():
        entry = table[value - 1]
        seen = entry.class_index is not None and _visible(labels, value, box, entry)
        if entry.class_index is not None and seen >= least_visible:
            boxes.append(box)
            counted[value] = entry.class_index
        else:
            ignored.append(box)
    target: TrainingTarget = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(list(counted.values()), dtype=torch.long),
        "ignored": torch.tensor(ignored, dtype=torch.float32).reshape(-1, 4),
    }
    if outlines is not None:
        _add_outlines(target, labels, table, counted, outlines, unsure)
    return target


def _add_outlines(
    target: TrainingTarget,
    labels: NDArray[np.uint8],
    table: list[CropLabel],
    counted: dict[int, int],
    outlines: OutlineTargets,
    unsure: NDArray[np.bool_] | None,
) -> None:
    """Add what models that draw outlines learn from; ``counted`` has the class of each value with a box."""
    guessed = [value for value, entry in enumerate(table, start=1) if not entry.outlined]
    drawn = labels[None] == np.array(list(counted), dtype=np.uint8)[:, None, None]
    drawn &= np.array([value not in guessed for value in counted], dtype=bool)[:, None, None]
    target["masks"] = torch.from_numpy(drawn)
    meant = [
        counted.get(value) if entry.outlined else None for value, entry in enumerate(table, start=1)
    ]
    class_map = make_class_map(labels, meant)
    if unsure is not None:
        class_map[unsure & (class_map == BACKGROUND)] = IGNORED
    target["class_map"] = torch.from_numpy(class_map)
    if outlines.border_weight > 0:
        # A border to a guessed ellipse is a guess too.
        known = np.where(np.isin(labels, guessed), 0, labels) if guessed else labels
        weights = border_weights(known, outlines.border_weight, outlines.border_sigma)
        target["added_weights"] = torch.from_numpy(weights)
