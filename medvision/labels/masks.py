"""A scan's reference findings as a label volume and a CSV: <case_id>.nii.gz and <case_id>.csv."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvision import geometry
from medvision.errors import InputError
from medvision.geometry import Affine, Box, BoxMm
from medvision.labels.annotation import Annotation
from medvision.labels.diameter import box_diameter_mm, mask_diameter_mm
from medvision.labels.table import LabelRow, check_class_name, read_table, write_table
from medvision.scans.images import IMAGE_KINDS, read_image, write_image
from medvision.scans.volume import Volume

DEFAULT_CLASS = "lesion"
"""The class of a lesion in a label volume that no CSV describes."""

MAX_LABEL = 65535
"""Largest label: label volumes are written as 8 or 16 bit."""


def write_labels(
    folder: Path, case_id: str, volume: Volume, annotations: Sequence[Annotation]
) -> None:
    """Write ``folder/<case_id>.nii.gz`` in the scan's grid and ``folder/<case_id>.csv``.

    No annotations give an all-zero volume and a CSV with only its header: a healthy scan. Where
    masks overlap the smaller lesion keeps the voxels. Annotations that are all boxes without masks
    are written as a CSV alone, and a label volume of that case that was there is removed.
    Raises InputError for a label that comes twice, a mix of masks and bare boxes, a mask outside
    the scan, or a lesion that smaller ones cover wholly.
    """
    _check_writable(annotations)
    path = folder / f"{case_id}.nii.gz"
    if annotations and all(item.mask is None for item in annotations):
        path.unlink(missing_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_image(path, Volume(_paint(volume.shape, annotations), volume.affine))
    rows = [_row(item, volume.affine) for item in annotations]
    write_table(folder / f"{case_id}.csv", rows)


def read_labels(
    folder: Path,
    case_id: str,
    shape: tuple[int, int, int],
    affine: Affine,
    *,
    scan_path: Path | None = None,
) -> list[Annotation] | None:
    """Read the annotations of a scan of ``shape`` (slices, rows, columns) and ``affine`` (LPS mm).

    Returns None where there is no label file at all (the scan is unlabelled) and [] for a healthy
    scan. A label volume whose axes are only permuted or flipped against the scan's is reoriented,
    exactly. Without a CSV every label is of class "lesion"; a volume that holds only the value 1 is
    then taken apart into its 26-connected components, each one lesion. Without a label volume the
    CSV's boxes are used (voxel edges, else LPS mm) and masks are None. ``scan_path`` is never read
    as a label volume, so that labels may lie beside the scans.
    Raises InputError if the geometries differ, values are not whole numbers from 0, or CSV and
    volume name different labels.
    """
    path = _find_volume(folder, case_id, scan_path)
    table = folder / f"{case_id}.csv"
    rows = read_table(table) if table.is_file() else None
    if path is None:
        return None if rows is None else [_boxed(row, shape, affine, table) for row in rows]
    labels = _read_label_array(path, shape, affine)
    if rows is None:
        rows = _default_rows(labels)
        if len(rows) == 1 and rows[0].label == 1:
            labels, rows = _components(labels)
    return _annotations(labels, rows, path, table)


def has_labels(folder: Path, case_id: str, scan_path: Path | None = None) -> bool:
    """Tell whether a case has a label file, without reading it."""
    found = _find_volume(folder, case_id, scan_path) is not None
    return found or (folder / f"{case_id}.csv").is_file()


def _find_volume(folder: Path, case_id: str, scan_path: Path | None) -> Path | None:
    paths = [folder / f"{case_id}{suffix}" for suffix in IMAGE_KINDS]
    found = [path for path in paths if path.is_file() and path != scan_path]
    if len(found) > 1:
        raise InputError(
            f"A case may have one label volume; {case_id} has {[path.name for path in found]}.",
            where=folder,
            do="Remove or rename all but one.",
        )
    return found[0] if found else None


def _check_writable(annotations: Sequence[Annotation]) -> None:
    labels = [item.label for item in annotations]
    if len(set(labels)) < len(labels) or max(labels, default=1) > MAX_LABEL:
        raise InputError(f"Labels must differ and be at most {MAX_LABEL}; got {labels}.")
    for item in annotations:
        check_class_name(item.class_name, f"label {item.label}")
    bare = [item.label for item in annotations if item.mask is None]
    if bare and len(bare) < len(labels):
        raise InputError(
            f"The lesions of a scan must all have masks or all be bare boxes; no mask: {bare}."
        )


def _paint(shape: tuple[int, int, int], annotations: Sequence[Annotation]) -> NDArray:
    kind = np.uint8 if max((item.label for item in annotations), default=0) < 256 else np.uint16
    labels = np.zeros(shape, dtype=kind)
    masks = [(item, item.mask) for item in annotations if item.mask is not None]
    for item, mask in sorted(masks, key=lambda pair: -int(pair[1].sum())):
        window = item.box.slices
        if labels[window].shape != mask.shape:
            raise InputError(
                f"A lesion must lie inside the scan {shape}; label {item.label} has {item.box}."
            )
        labels[window][mask] = item.label
    for item, mask in masks:
        if not (labels[item.box.slices][mask] == item.label).any():
            raise InputError(
                f"Every lesion needs a voxel of its own; label {item.label} is empty or covered."
            )
    return labels


def _row(item: Annotation, affine: Affine) -> LabelRow:
    diameter = (
        box_diameter_mm(item.box, affine)
        if item.mask is None
        else mask_diameter_mm(item.mask, affine)
    )
    box_mm = geometry.box_to_patient(affine, item.box)
    return LabelRow(item.label, item.class_name, item.ignore, item.box, box_mm, diameter)


def _read_label_array(path: Path, shape: tuple[int, int, int], affine: Affine) -> NDArray:
    volume = read_image(path)
    return _whole_numbers(_to_grid(volume, shape, affine, path), path)


def _to_grid(volume: Volume, shape: tuple[int, int, int], affine: Affine, path: Path) -> NDArray:
    """Return the array in the scan's grid; its axes are permuted and flipped if that suffices."""
    if volume.shape == shape and geometry.same_grid(volume.affine, affine, shape):
        return volume.array
    steps = np.linalg.solve(affine[:3, :3], volume.affine[:3, :3])
    order = np.abs(steps).argmax(axis=1)
    if sorted(order) == [0, 1, 2]:
        array = volume.array.transpose(order)
        moved = volume.affine[:, [*order, 3]].copy()
        for axis in range(3):
            if steps[axis, order[axis]] < 0:
                array = np.flip(array, axis)
                moved[:3, 3] += moved[:3, axis] * (array.shape[axis] - 1)
                moved[:3, axis] *= -1
        if array.shape == shape and geometry.same_grid(moved, affine, shape):
            return np.ascontiguousarray(array)
    raise InputError(
        f"A label volume must lie in its scan's grid. "
        f"Labels: {_describe(volume.shape, volume.affine)}. Scan: {_describe(shape, affine)}.",
        where=path,
        do="Export the labels in the scan's geometry, or resample them to it (nearest neighbour).",
    )


def _describe(shape: tuple[int, int, int], affine: Affine) -> str:
    spacing = " x ".join(f"{value:.4g}" for value in geometry.spacing_of(affine))
    origin = ", ".join(f"{value:.2f}" for value in affine[:3, 3])
    axes = geometry.directions_of(affine).T.round(3) + 0.0
    return (
        f"{' x '.join(map(str, shape))} voxels (slices x rows x columns) of {spacing} mm, "
        f"first voxel at ({origin}) mm LPS, directions {axes.tolist()}"
    )


def _whole_numbers(array: NDArray, path: Path) -> NDArray:
    low, high = array.min(), array.max()
    whole = array.dtype.kind in "biu" or bool((array == np.rint(array)).all())
    if not (whole and low >= 0 and high <= MAX_LABEL):
        raise InputError(
            f"A label volume holds whole numbers 0..{MAX_LABEL}; got {low}..{high}"
            f"{'' if whole else ' with fractions'}.",
            where=path,
            do="Check that this is a label volume and not a scan or a probability map.",
        )
    return array.astype(np.uint16 if high > 255 else np.uint8, copy=False)


def _windows(labels: NDArray) -> dict[int, tuple[slice, slice, slice]]:
    from scipy.ndimage import find_objects

    found = enumerate(find_objects(labels), start=1)
    return {label: window for label, window in found if window is not None}


def _default_rows(labels: NDArray) -> list[LabelRow]:
    return [LabelRow(label, DEFAULT_CLASS) for label in _windows(labels)]


def _components(labels: NDArray) -> tuple[NDArray, list[LabelRow]]:
    from scipy.ndimage import label as label_components

    parts, count = label_components(labels, structure=np.ones((3, 3, 3), dtype=bool))
    return parts, [LabelRow(number, DEFAULT_CLASS) for number in range(1, count + 1)]


def _annotations(
    labels: NDArray, rows: list[LabelRow], path: Path, table: Path
) -> list[Annotation]:
    windows = _windows(labels)
    named = {row.label for row in rows}
    if named != set(windows):
        raise InputError(
            f"Label volume and CSV must name the same lesions; only in the CSV: "
            f"{sorted(named - set(windows))}, only in the volume: {sorted(set(windows) - named)}.",
            where=f"{path} and {table.name}",
            do="Add the missing rows to the CSV, or take out the rows that have no voxels.",
        )
    return [_masked(row, labels, windows[row.label]) for row in rows]


def _masked(row: LabelRow, labels: NDArray, window: tuple[slice, slice, slice]) -> Annotation:
    box = Box(*(axis.start for axis in window), *(axis.stop for axis in window))
    return Annotation(row.label, row.class_name, box, labels[window] == row.label, row.ignore)


def _boxed(row: LabelRow, shape: tuple[int, int, int], affine: Affine, table: Path) -> Annotation:
    box = row.box
    if box is None and row.box_mm is not None:
        box = _box_from_mm(row.box_mm, affine)
    if box is None:
        raise InputError(
            f"Without a label volume every lesion needs a box; label {row.label} has none.",
            where=table,
            do="Fill slice_min ... column_max (or x_min_mm ... z_max_mm), or add the label volume.",
        )
    if not ((box.lower < shape) & (box.upper > 0)).all():
        raise InputError(
            f"A lesion must lie inside the scan {shape}; label {row.label} has {box}.", where=table
        )
    return Annotation(row.label, row.class_name, box.clip(shape), None, row.ignore)


def _box_from_mm(box_mm: BoxMm, affine: Affine) -> Box:
    """Return the voxel box that holds all eight corners of a box in mm."""
    edges = astuple(box_mm)
    corners = list(product(*zip(edges[:3], edges[3:], strict=True)))
    indices = geometry.patient_to_index(affine, corners) + 0.5
    return Box(*indices.min(axis=0).tolist(), *indices.max(axis=0).tolist())
