"""Which crop is sample number i: a function of the seed and i alone, so that a run can be resumed exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from torch import Tensor

from medvision.models.criterion import Target
from medvision.stacks.augment import Augmenter
from medvision.stacks.config import StackConfig
from medvision.stacks.crops import crop_padded
from medvision.stacks.slice_stack import slice_stack, stack_offsets
from medvision.stacks.window import apply_window
from medvision.training.cache import CachedCase
from medvision.training.config import SamplingConfig
from medvision.training.hard_negatives import HardNegative
from medvision.training.paste import Cutout, cut_out, paste
from medvision.training.targets import (
    CropLabel,
    OutlineTargets,
    enter_label,
    make_target,
    unsure_region,
)

_MARGIN = 1.25
"""Crops are cut larger and trimmed after rotation, so that corners hold scan and not padding."""

_SHARPNESS = 4
"""Power of its score by which a false positive is shown again: most of them score a fifth, those that cost
lesions a half, and by the score itself these would be one in many.
"""


@dataclass(frozen=True)
class Lesion:
    """A lesion to draw crops of: where it is in which case."""

    case: int
    label: int
    class_index: int
    planes: NDArray[np.int64]
    center: tuple[float, float]
    half_size: tuple[float, float]
    window: tuple[slice, slice, slice]


@dataclass(frozen=True)
class Sample:
    """A stack ``[channel, row, column]`` in 0..1 with its target and the case it came from."""

    image: Tensor
    target: Target
    case_id: str


def find_training_lesions(cases: list[CachedCase], class_names: tuple[str, ...]) -> list[Lesion]:
    """List the lesions of all cases that count, with the slices they are on."""
    lesions = []
    for number, case in enumerate(cases):
        for label, where in enumerate(find_objects(np.asarray(case.labels)), start=1):
            if where is None or label in case.ignored:
                continue
            planes = where[0].start + np.flatnonzero((case.labels[where] == label).any(axis=(1, 2)))
            center = ((where[1].start + where[1].stop) / 2, (where[2].start + where[2].stop) / 2)
            half = ((where[1].stop - where[1].start) / 2, (where[2].stop - where[2].start) / 2)
            index = class_names.index(case.classes[label])
            lesions.append(Lesion(number, label, index, planes, center, half, where))
    return lesions


class CropSampler(torch.utils.data.Dataset[Sample]):
    """Sample ``i`` of a run: lesion-centred or background, augmented, with its boxes."""

    def __init__(
        self,
        cases: list[CachedCase],
        lesions: list[Lesion],
        stack: StackConfig,
        sampling: SamplingConfig,
        augmenter: Augmenter,
        seed: int,
        outlines: OutlineTargets | None = None,
    ) -> None:
        """Draw from ``lesions`` of ``cases``; with ``outlines`` targets have outlines and class maps too."""
        self.cases = cases
        self.lesions = lesions
        self.stack = stack
        self.sampling = sampling
        self.augmenter = augmenter
        self.seed = seed
        self.outlines = outlines
        self.show_again([])
        self._weights = lesion_weights(lesions, sampling.class_balance)
        self._present = [labels_by_plane(case.labels) for case in cases]
        self._class_of = {(item.case, item.label): item.class_index for item in lesions}
        self._cutouts = self._cut_out_all() if sampling.paste_share else []
        self._size = int(np.ceil(sampling.crop_size * _MARGIN))

    def __getitem__(self, index: int) -> Sample:
        """Return sample ``index``; the same one whenever and wherever it is asked for."""
        generator = np.random.default_rng([self.seed, index])
        number, plane, center = self._draw(generator)
        case = self.cases[number]
        top, left = (round(middle - self._size / 2) for middle in center)
        size = (self._size, self._size)
        offsets = stack_offsets(
            self.stack.n_slices, self.stack.slice_offset_mm, case.volume.spacing_mm[0]
        )
        window = self._near_planes(case, plane, offsets)
        pixels = crop_padded(case.array[window], top, left, size, case.limits[0])
        stack = slice_stack(pixels, plane - window.start, offsets)
        labels, table = self._label_crop(number, plane, top, left)
        unsure = unsure_region(
            case.boxes_near(plane, self.sampling.ignore_slices), top, left, self._size
        )
        unsure |= self._paste(stack, labels, table, case.limits[1] - case.limits[0], generator)
        image = apply_window(stack, case.limits)
        seed = int(generator.integers(2**31))
        moved, moved_labels = self.augmenter(image, labels, seed)
        moved_unsure = None
        if self.outlines is not None and unsure.any():
            # The same seed moves it as the labels, which have no value left for it.
            moved_unsure = self.augmenter(image[:1], unsure.astype(np.uint8), seed)[1] > 0
        target = make_target(
            moved_labels, table, self.sampling.least_visible, self.outlines, moved_unsure
        )
        return Sample(torch.from_numpy(moved), target, case.case_id)

    def _cut_out_all(self) -> list[Cutout]:
        cutouts = []
        for lesion in self.lesions:
            case = self.cases[lesion.case]
            offsets = stack_offsets(
                self.stack.n_slices, self.stack.slice_offset_mm, case.volume.spacing_mm[0]
            )
            cutouts.append(
                cut_out(case, lesion.label, lesion.window, int(np.ceil(offsets[-1])) + 1)
            )
        return cutouts

    def _draw(self, generator: np.random.Generator) -> tuple[int, int, tuple[float, float]]:
        """Choose a case, a slice and the centre (row, column) of the crop."""
        choice = generator.random()
        if self.lesions and choice < self.sampling.lesion_share:
            lesion = self.lesions[generator.choice(len(self.lesions), p=self._weights)]
            reach = self.sampling.crop_size / 2 - 8
            jitter = [
                generator.uniform(-1, 1) * max(4.0, reach - half) for half in lesion.half_size
            ]
            center = (lesion.center[0] + jitter[0], lesion.center[1] + jitter[1])
            return lesion.case, int(generator.choice(lesion.planes)), center
        if self._hard_negatives and choice > 1 - self.sampling.hard_share:
            return self._draw_hard(generator)
        number = int(generator.integers(len(self.cases)))
        slices, rows, columns = self.cases[number].array.shape
        return (
            number,
            int(generator.integers(slices)),
            (self._position(generator, rows), self._position(generator, columns)),
        )

    def show_again(self, found: list[HardNegative]) -> None:
        """Show false positives from now on, the higher their score the more often."""
        weights = np.array([item.score for item in found]) ** _SHARPNESS
        self._hard_negatives = found
        self._hard_weights = weights / weights.sum() if found else weights

    def _draw_hard(self, generator: np.random.Generator) -> tuple[int, int, tuple[float, float]]:
        item = self._hard_negatives[generator.choice(len(self._hard_weights), p=self._hard_weights)]
        reach = self.sampling.crop_size / 2 - 8
        row, column = generator.uniform(-reach, reach, 2)
        return item.case, item.plane, (item.row + row, item.column + column)

    def _position(self, generator: np.random.Generator, length: int) -> float:
        half = min(self.sampling.crop_size, length) / 2
        return float(generator.uniform(half, length - half))

    def _near_planes(self, case: CachedCase, plane: int, offsets: NDArray[np.float64]) -> slice:
        reach = int(np.ceil(offsets[-1])) + 1
        return slice(max(0, plane - reach), min(len(case.array), plane + reach + 1))

    def _label_crop(
        self, number: int, plane: int, top: int, left: int
    ) -> tuple[NDArray[np.uint8], list[CropLabel]]:
        """Return the crop's label map renumbered 1..n, and what each number stands for.

        Lesions within ``ignore_slices`` of this slice are drawn where they are there, under the
        lesions of the slice itself: they are to be ignored, as a reader cannot tell where a
        lesion ends.
        """
        reach = self.sampling.ignore_slices
        labels, boxed = self.cases[number].labels, self.cases[number].boxed
        size = (self._size, self._size)
        crop = np.zeros(size, dtype=np.uint8)
        table: list[CropLabel] = []
        here = self._present[number].get(plane, set())
        for z in range(max(0, plane - reach), min(len(labels), plane + reach + 1)):
            faint = self._present[number].get(z, set()) - here
            cut = crop_padded(labels[z], top, left, size, 0) if faint else crop
            for label in sorted(faint):
                entry = CropLabel(None, outlined=label not in boxed)
                enter_label(crop, table, cut == label, entry)
        cut = crop_padded(labels[plane], top, left, size, 0) if here else crop
        for label in sorted(here):
            mask = cut == label
            area = int((labels[plane] == label).sum())
            index = self._class_of.get((number, label))
            whole = int(mask.sum()) == area
            enter_label(crop, table, mask, CropLabel(index, area, whole, label not in boxed))
        return crop, table

    def _paste(
        self,
        stack: NDArray[np.float32],
        labels: NDArray[np.uint8],
        table: list[CropLabel],
        width: float,
        generator: np.random.Generator,
    ) -> NDArray[np.bool_]:
        """Put a lesion of some training scan into this crop, if a place for it is found.

        Return ``[row, column]``: where it may be, if its outline is not known; else nowhere.
        """
        nowhere = np.zeros(labels.shape, dtype=bool)
        if not self._cutouts or generator.random() >= self.sampling.paste_share:
            return nowhere
        chosen = int(generator.choice(len(self.lesions), p=self._weights))
        lesion = self.lesions[chosen]
        spacing_mm = self.cases[lesion.case].volume.spacing_mm[0]
        offsets = stack_offsets(self.stack.n_slices, self.stack.slice_offset_mm, spacing_mm)
        border = (self._size - self.sampling.crop_size) // 2
        cutout = self._cutouts[chosen]
        zoom = self.sampling.paste_zoom
        outlined = lesion.label not in self.cases[lesion.case].boxed
        before = None if outlined else stack.copy()
        mask = paste(stack, labels > 0, cutout, offsets, width, border, generator, zoom)
        if mask is None:
            return nowhere
        table.append(CropLabel(lesion.class_index, int(mask.sum()), True, outlined))
        labels[mask] = len(table)
        # Of the lesion's box no more came here than what was changed.
        return nowhere if before is None else (stack != before).any(axis=0)


def labels_by_plane(labels: NDArray[np.integer]) -> dict[int, set[int]]:
    """Return which labels are on which slice of ``labels[slice, row, column]``; empty slices left out."""
    present: dict[int, set[int]] = {}
    for label, where in enumerate(find_objects(np.asarray(labels)), start=1):
        if where is not None:
            for offset in np.flatnonzero((labels[where] == label).any(axis=(1, 2))).tolist():
                present.setdefault(where[0].start + offset, set()).add(label)
    return present


def lesion_weights(lesions: list[Lesion], balance: float) -> NDArray[np.float64]:
    """Return how often each lesion is drawn; sums to 1. ``balance`` 0: alike, 1: classes alike."""
    classes = np.array([lesion.class_index for lesion in lesions], dtype=int)
    if len(classes) == 0:
        return np.empty(0)
    weights = np.bincount(classes)[classes].astype(float) ** -balance
    return weights / weights.sum()


def collate(samples: list[Sample]) -> tuple[Tensor, list[Target], list[str]]:
    """Put samples into a batch ``[batch, channel, row, column]``."""
    images = torch.stack([sample.image for sample in samples])
    return images, [sample.target for sample in samples], [sample.case_id for sample in samples]
