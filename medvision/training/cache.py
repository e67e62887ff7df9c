"""Training scans as the network sees them, on disk as plain arrays that are mapped, not loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from medvision.datasets.discover import LoadedCase
from medvision.errors import InputError
from medvision.files import atomic_path
from medvision.findings.measure import ellipsoid_in_box
from medvision.geometry import Affine, Box
from medvision.labels.annotation import Annotation
from medvision.scans.volume import ScanSource, Volume
from medvision.stacks.resample import (
    inplane_shape,
    needs_resampling,
    resample_inplane,
    resize_slices,
)
from medvision.stacks.window import window_limits


class SliceLesion(NamedTuple):
    """A lesion on one slice: ``box`` is x1, y1, x2, y2 in pixel edges of the cached scan."""

    class_name: str
    slice_index: int
    box: NDArray[np.float64]


@dataclass(frozen=True)
class CachedCase:
    """One training scan at the network's pixel size.

    ``array`` and ``labels`` are ``[slice, row, column]``; ``labels`` holds 0 or an annotation's label.
    ``classes`` names each label's class, ``ignored`` are labels that count neither way. ``boxed`` has the
    box, in voxel edges of this grid, of each label whose outline is not known: what ``labels`` holds of it
    is an ellipsoid, which serves to find its box on a slice and is no outline to learn.
    """

    case_id: str
    patient_id: str
    array: NDArray
    labels: NDArray[np.uint16]
    affine: Affine
    modality: str
    limits: tuple[float, float]
    classes: dict[int, str]
    ignored: frozenset[int]
    boxed: dict[int, Box] = field(default_factory=dict)

    @property
    def volume(self) -> Volume:
        """The scan as a volume, for validation."""
        return Volume(self.array, self.affine, ScanSource(modality=self.modality))

    def annotations(self) -> tuple[Annotation, ...]:
        """The reference findings in this grid."""
        labels = np.asarray(self.labels)
        return tuple(
            Annotation(
                label,
                self.classes[label],
                Box(*(axis.start for axis in where), *(axis.stop for axis in where)),
                labels[where] == label,
                label in self.ignored,
            )
            for label, where in enumerate(find_objects(labels), start=1)
            if where is not None
        )

    def boxes_near(self, plane: int, reach: int) -> list[Box]:
        """Return the boxes of ``boxed`` that are on slice ``plane`` or at most ``reach`` slices from it."""
        return [
            box
            for box in self.boxed.values()
            if box.slice_min - reach <= plane < box.slice_max + reach
        ]

    def slice_boxes(self) -> Iterator[SliceLesion]:
        """Yield the box of every lesion that counts, on every slice it is on."""
        for item in self.annotations():
            if item.ignore or item.mask is None:
                continue
            for plane in np.flatnonzero(item.mask.any(axis=(1, 2))):
                rows = np.flatnonzero(item.mask[plane].any(axis=1)) + item.box.row_min
                columns = np.flatnonzero(item.mask[plane].any(axis=0)) + item.box.column_min
                edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                index = int(item.box.slice_min + plane)
                yield SliceLesion(item.class_name, index, np.array(edges, dtype=float))


def cache_case(
    loaded: LoadedCase, folder: Path, pixel_mm: float, window_hu: tuple[float, float] | None
) -> CachedCase:
    """Bring a scan and its labels to ``pixel_mm`` and map them from ``folder``."""
    volume = resample_inplane(loaded.volume, pixel_mm)
    labels = label_array(loaded.volume.shape, loaded.annotations)
    if needs_resampling(loaded.volume.spacing_mm, pixel_mm):
        shape = inplane_shape(loaded.volume.shape, loaded.volume.spacing_mm, pixel_mm)
        labels = _resize_labels(labels, shape[1:])
    case = loaded.case
    ratio = np.array(volume.shape) / np.array(loaded.volume.shape)
    return CachedCase(
        case_id=case.case_id,
        patient_id=case.patient_id,
        array=_mapped(folder / f"{case.case_id}.scan.npy", volume.array),
        labels=_mapped(folder / f"{case.case_id}.labels.npy", labels),
        affine=volume.affine,
        modality=volume.source.modality,
        limits=window_limits(volume.array, window_hu),
        classes={item.label: item.class_name for item in loaded.annotations},
        ignored=frozenset(item.label for item in loaded.annotations if item.ignore),
        boxed={
            item.label: _scaled(item, ratio) for item in loaded.annotations if item.mask is None
        },
    )


def label_array(
    shape: tuple[int, int, int], annotations: tuple[Annotation, ...]
) -> NDArray[np.uint16]:
    """Return the label map of a scan; a lesion known by its box only becomes an ellipsoid.

    Where lesions overlap the smaller one wins, so that none disappears under another. Raises
    InputError if a label is above 65535.
    """
    labels = np.zeros(shape, dtype=np.uint16)
    for item in sorted(annotations, key=_size, reverse=True):
        if item.label > np.iinfo(np.uint16).max:
            raise InputError(f"A lesion's label must be at most 65535; got {item.label}.")
        region = labels[item.box.slices]
        mask = ellipsoid_in_box(item.box, region.shape) if item.mask is None else item.mask
        region[mask] = item.label
    return labels


def _scaled(item: Annotation, ratio: NDArray[np.float64]) -> Box:
    """Return the box in a grid of ``ratio`` times the voxels, grown to whole voxels of its own before."""
    low = np.array([axis.start for axis in item.box.slices]) * ratio
    high = np.array([axis.stop for axis in item.box.slices]) * ratio
    return Box(*low.tolist(), *high.tolist())


def _size(item: Annotation) -> float:
    if item.mask is not None:
        return float(item.mask.sum())
    return float((item.box.upper - item.box.lower).prod())


def _resize_labels(labels: NDArray[np.uint16], size: tuple[int, int]) -> NDArray[np.uint16]:
    """Resize to the nearest label; a lesion that falls between the samples keeps one pixel."""
    resized = resize_slices(labels, size, smooth=False)
    scale = np.array(size) / labels.shape[1:]
    for value in np.setdiff1d(np.unique(labels), np.unique(resized)):
        points = np.argwhere(labels == value)
        middle = points[len(points) // 2]
        row, column = np.minimum((middle[1:] + 0.5) * scale, np.array(size) - 1).astype(int)
        resized[middle[0], row, column] = value
    return resized


def _mapped(path: Path, array: NDArray) -> NDArray:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)
