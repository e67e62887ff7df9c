"""Lesion probability of every voxel -> Findings: the connected components in 3-D."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.findings.config import ComponentsConfig
from medvision.findings.finding import Finding, SliceBox
from medvision.findings.measure import mask_diameter_mm, mask_volume_mm3
from medvision.geometry import Affine, Box, box_to_patient, index_to_patient

_RANK = {6: 1, 18: 2, 26: 3}


@dataclass(frozen=True)
class ProbabilityVolume:
    """What a segmentation says of the voxels of a window of a scan, on the grid that the network saw.

    ``lesion[slice, row, column]`` and ``classes[class, slice, row, column]`` in 0..1. The window starts at
    ``corner`` (row, column) of slices of ``plane_shape`` (rows, columns) that cover the field of the
    scan's own slices; it holds all slices. :meth:`of_scan` makes one on the scan's own grid.
    """

    lesion: NDArray[np.floating]
    classes: NDArray[np.floating]
    corner: tuple[int, int]
    plane_shape: tuple[int, int]

    @classmethod
    def of_scan(
        cls, lesion: NDArray[np.floating], classes: NDArray[np.floating]
    ) -> ProbabilityVolume:
        """Return a volume whose grid is that of the scan."""
        return cls(lesion, classes, (0, 0), (lesion.shape[1], lesion.shape[2]))


@dataclass(frozen=True)
class Component:
    """Voxels of a :class:`ProbabilityVolume` that are one lesion.

    ``mask`` and ``probability`` fill ``window``; ``score`` is the mean probability over the mask.
    """

    window: tuple[slice, slice, slice]
    mask: NDArray[np.bool_]
    probability: NDArray[np.floating]
    score: float


def find_components_as_findings(
    probabilities: ProbabilityVolume,
    config: ComponentsConfig,
    class_names: tuple[str, ...],
    shape: tuple[int, int, int],
    affine: Affine,
    *,
    lowest_score: float = 0.0,
    most: int = 100,
) -> tuple[Finding, ...]:
    """Return the lesions of a scan of ``shape`` and ``affine``, by falling score, at most ``most``.

    Score is the mean probability of the lesion's voxels; those under ``lowest_score`` are left out. Boxes and
    masks are in the scan's own voxels. Raises InputError for arrays that do not go together.
    """
    _check(probabilities, class_names, shape)
    found = find_components(probabilities.lesion, config, lowest_score, most)
    return tuple(
        _finding(number, component, probabilities, class_names, shape, affine)
        for number, component in enumerate(found, start=1)
    )


def find_components(
    lesion: NDArray[np.floating],
    config: ComponentsConfig,
    lowest_score: float = 0.0,
    most: int = 100,
) -> list[Component]:
    """Return the components of ``lesion[slice, row, column]``, by falling mean probability.

    Voxels of at least ``threshold`` that touch are one component; one that nowhere reaches
    ``seed_threshold`` is dropped (the hysteresis of Canny, PAMI 1986). A component is then cut at
    ``peak_share`` of its highest probability, at 0.5 its full width at half maximum, so that neither the
    blurred rim of a lesion nor a faint bridge between two belongs to them.
    """
    from scipy import ndimage

    neighbours = ndimage.generate_binary_structure(3, _RANK[config.connectivity])
    labels, count = ndimage.label(lesion >= config.threshold, neighbours)
    if count == 0:
        return []
    kept = _above_peak_share(lesion, labels, count, config)
    labels, count = ndimage.label(kept, neighbours)
    places = np.flatnonzero(labels)
    numbers = labels.ravel()[places]
    sizes = np.bincount(numbers, minlength=count + 1)[1:]
    sums = np.bincount(numbers, lesion.ravel()[places].astype(float), count + 1)[1:]
    scores = np.minimum(sums / np.maximum(sizes, 1), 1.0)
    enough = (sizes >= config.least_voxels) & (scores >= lowest_score)
    best = [index for index in np.argsort(-scores, kind="stable").tolist() if enough[index]]
    windows = ndimage.find_objects(labels)
    return [
        Component(
            windows[index],
            labels[windows[index]] == index + 1,
            lesion[windows[index]],
            float(scores[index]),
        )
        for index in best[:most]
    ]


def _above_peak_share(
    lesion: NDArray[np.floating], labels: NDArray[np.integer], count: int, config: ComponentsConfig
) -> NDArray[np.bool_]:
    places = np.flatnonzero(labels)
    numbers, values = labels.ravel()[places], lesion.ravel()[places].astype(float)
    peaks = np.zeros(count + 1)
    np.maximum.at(peaks, numbers, values)
    peak = peaks[numbers]
    kept = np.zeros(lesion.size, dtype=bool)
    kept[places] = (peak >= config.seed_threshold) & (values >= config.peak_share * peak)
    return kept.reshape(lesion.shape)


def _check(
    probabilities: ProbabilityVolume, class_names: tuple[str, ...], shape: tuple[int, int, int]
) -> None:
    lesion, classes = probabilities.lesion, probabilities.classes
    if classes.shape != (len(class_names), *lesion.shape):
        raise InputError(
            f"Class probabilities must be {(len(class_names), *lesion.shape)}; got {classes.shape}."
        )
    ends = np.add(probabilities.corner, lesion.shape[1:])
    if lesion.shape[0] != shape[0] or (ends > probabilities.plane_shape).any():
        raise InputError(
            f"Probabilities {lesion.shape} at {probabilities.corner} must lie in {shape[0]} slices "
            f"of {probabilities.plane_shape}."
        )


def _finding(
    finding_id: int,
    component: Component,
    probabilities: ProbabilityVolume,
    class_names: tuple[str, ...],
    shape: tuple[int, int, int],
    affine: Affine,
) -> Finding:
    inside = component.mask
    classes = probabilities.classes[(slice(None), *component.window)][:, inside]
    shares = classes.mean(axis=1, dtype=float)
    mask, corner = _in_scan(component, probabilities, shape)
    box = Box(*corner, *(start + size for start, size in zip(corner, mask.shape, strict=True)))
    slice_boxes = _slice_boxes(component, mask, corner)
    return Finding(
        finding_id=finding_id,
        class_name=class_names[int(shares.argmax())],
        score=component.score,
        box=box,
        box_mm=box_to_patient(affine, box),
        center_mm=_center_mm(component, probabilities, shape, affine),
        key_slice=max(slice_boxes, key=lambda item: item.score).slice_index,
        diameter_mm=mask_diameter_mm(mask, affine),
        volume_mm3=mask_volume_mm3(mask, affine),
        class_scores=_class_scores(class_names, shares, component.score),
        slice_boxes=slice_boxes,
        mask=mask,
    )


def _class_scores(
    class_names: tuple[str, ...], shares: NDArray[np.float64], score: float
) -> dict[str, float]:
    """Return the score of the finding, split by class in the ratio of the mean probabilities."""
    total = shares.sum()
    even = np.full(len(shares), 1 / len(shares))
    split = np.divide(shares, total, out=even, where=total > 0)
    return {name: float(score * part) for name, part in zip(class_names, split, strict=True)}


def _in_scan(
    component: Component, probabilities: ProbabilityVolume, shape: tuple[int, int, int]
) -> tuple[NDArray[np.bool_], tuple[int, int, int]]:
    """Return the component's mask in the scan's voxels, tight, and where it starts.

    A voxel of the scan is inside if its centre lies in a voxel that is. Where the scan is
    coarser, a lesion between all centres gets the voxel that holds its middle.
    """
    from scipy import ndimage

    planes, rows, columns = component.window
    first_row, rows_in = _sources(rows, 0, probabilities, shape)
    first_column, columns_in = _sources(columns, 1, probabilities, shape)
    mask = component.mask[:, rows_in][:, :, columns_in]
    if not mask.any():
        middle = _center_index(component, probabilities, shape)
        start = np.clip(np.rint(middle), 0, np.subtract(shape, 1)).astype(int).tolist()
        return np.ones((1, 1, 1), dtype=bool), (start[0], start[1], start[2])
    tight = ndimage.find_objects(mask.view(np.uint8))[0]
    corner = (
        planes.start + tight[0].start,
        first_row + tight[1].start,
        first_column + tight[2].start,
    )
    return mask[tight], corner


def _sources(
    window: slice, axis: int, probabilities: ProbabilityVolume, shape: tuple[int, int, int]
) -> tuple[int, NDArray[np.int64]]:
    """Return the first scan row (axis 0) or column (1) over ``window``, and each one's index in it."""
    ratio = probabilities.plane_shape[axis] / shape[1 + axis]  # seen pixels a pixel of the scan
    start = probabilities.corner[axis] + window.start
    end = probabilities.corner[axis] + window.stop
    low = max(0, int(np.floor(start / ratio)) - 1)
    high = min(shape[1 + axis], int(np.ceil(end / ratio)) + 1)
    seen = np.floor((np.arange(low, high) + 0.5) * ratio).astype(np.int64) - start
    inside = np.flatnonzero((seen >= 0) & (seen < end - start))
    first = low + (int(inside[0]) if len(inside) else 0)
    return first, seen[inside]


def _center_index(
    component: Component, probabilities: ProbabilityVolume, shape: tuple[int, int, int]
) -> NDArray[np.float64]:
    """Return the middle of a component, weighted by probability, as an index into the scan."""
    places = np.argwhere(component.mask)
    weights = component.probability[component.mask].astype(float)
    low = np.array([part.start for part in component.window], dtype=float)
    seen = np.average(places, axis=0, weights=weights) + low + (0, *probabilities.corner)
    ratio = np.divide((1, *shape[1:]), (1, *probabilities.plane_shape))
    return (seen + 0.5) * ratio - 0.5


def _center_mm(
    component: Component,
    probabilities: ProbabilityVolume,
    shape: tuple[int, int, int],
    affine: Affine,
) -> tuple[float, float, float]:
    center = index_to_patient(affine, _center_index(component, probabilities, shape))
    return (float(center[0]), float(center[1]), float(center[2]))


def _slice_boxes(
    component: Component, mask: NDArray[np.bool_], corner: tuple[int, int, int]
) -> tuple[SliceBox, ...]:
    """Return the tight box of each slice of ``mask``, scored by the slice's mean probability."""
    first = component.window[0].start
    boxes = []
    for offset in np.flatnonzero(mask.any(axis=(1, 2))).tolist():
        rows = np.flatnonzero(mask[offset].any(axis=1)) + corner[1]
        columns = np.flatnonzero(mask[offset].any(axis=0)) + corner[2]
        plane = corner[0] + offset
        there = component.probability[plane - first][component.mask[plane - first]]
        score = float(there.mean(dtype=float)) if there.size else component.score
        boxes.append(
            SliceBox(
                plane,
                float(rows[0]),
                float(columns[0]),
                float(rows[-1] + 1),
                float(columns[-1] + 1),
                min(score, 1.0),
            )
        )
    return tuple(boxes)
