"""DICOM slices -> Volume: geometry checked before a pixel is read, values in HU."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError
from medvision.geometry import Affine, make_affine
from medvision.progress import ProgressCallback, ignore_progress
from medvision.scans.instance import Instance, read_instance
from medvision.scans.pixels import read_pixels, read_slice
from medvision.scans.series import order_instances
from medvision.scans.volume import ScanSource, Volume

_DIRECTION_TOLERANCE = 1e-3
_SAME_PLACE_MM = 1e-3
_IN_PLANE_SHIFT_MM = 0.1
_UNEVEN_MM = 0.01
_UNEVEN_FRACTION = 0.01
_DRIFT_NOTE_MM = 0.05


def read_series(
    files: Iterable[str | Path], *, on_progress: ProgressCallback = ignore_progress
) -> Volume:
    """Read the files of one DICOM series, in any order, as a volume in HU (for CT).

    Slices run along increasing position on the image normal. Raises InputError, naming the
    files, if they are no single evenly spaced stack or cannot be decoded; see ``read_instances``.
    """
    return read_instances([read_instance(Path(path)) for path in files], on_progress=on_progress)


def read_instances(
    instances: Sequence[Instance],
    *,
    notes: tuple[str, ...] = (),
    on_progress: ProgressCallback = ignore_progress,
) -> Volume:
    """Read the pixels of one series whose headers are known.

    ``notes`` are put before the reader's own.
    Geometry follows the Image Plane module (PS3.3 C.7.6.2), values the Modality LUT (C.11.1) and
    padding (C.7.5.1.1.2). Raises InputError on a slice without place, a mixed, tilted or unevenly
    spaced stack, different slices at one place, or pixels that cannot be decoded.
    """
    if not instances:
        raise InputError("A series needs at least one slice; got none.")
    for instance in instances:
        _check_slice(instance)
    ordered = order_instances(instances)
    for instance in ordered[1:]:
        _check_alike(ordered[0], instance)
    ordered, duplicate_notes = _drop_duplicates(ordered)
    _check_straight(ordered)
    spacing, spacing_notes = _slice_spacing(ordered)
    array, pixel_notes = read_pixels(ordered, on_progress)
    said = (*notes, *duplicate_notes, *spacing_notes, *pixel_notes)
    return Volume(array, _affine(ordered[0], spacing), _source(ordered), said)


def _check_slice(instance: Instance) -> None:
    reason = instance.why_no_slice
    if reason is not None:
        raise InputError(
            f"Every file of the series must be a slice; one is {reason}.", where=instance.path
        )
    for name, value in (
        ("ImagePositionPatient", instance.image_position),
        ("ImageOrientationPatient", instance.image_orientation),
        ("PixelSpacing", instance.pixel_spacing),
    ):
        if value is None:
            raise InputError(
                f"Every slice must say where it lies (PS3.3 C.7.6.2); {_name(instance)} has "
                f"no valid {name}.",
                where=instance.path,
                do="export the series again from the archive with its geometry.",
            )
    if min(instance.pixel_spacing or (0,)) <= 0:
        raise InputError(
            f"PixelSpacing must be above 0 mm; {_name(instance)} has {instance.pixel_spacing}.",
            where=instance.path,
            do="export the series again; its scale is unknown.",
        )
    _check_orientation(instance)


def _check_orientation(instance: Instance) -> None:
    column_direction, row_direction = _directions(instance)
    lengths = np.linalg.norm([column_direction, row_direction], axis=1)
    skew = abs(float(column_direction @ row_direction))
    if np.abs(lengths - 1).max() > _DIRECTION_TOLERANCE or skew > _DIRECTION_TOLERANCE:
        raise InputError(
            f"ImageOrientationPatient must be two unit vectors at right angles (within "
            f"{_DIRECTION_TOLERANCE}); {_name(instance)} has {instance.image_orientation}.",
            where=instance.path,
            do="export the series again; its orientation is damaged.",
        )


def _check_alike(first: Instance, other: Instance) -> None:
    """Refuse a stack whose slices differ in series, matrix, frame, directions or pixel size."""
    pairs: tuple[tuple[str, Any, Any, float | None], ...] = (
        ("SeriesInstanceUID", first.series_instance_uid, other.series_instance_uid, None),
        ("FrameOfReferenceUID", first.frame_of_reference_uid, other.frame_of_reference_uid, None),
        ("matrix", (first.rows, first.columns), (other.rows, other.columns), None),
        ("ImageOrientationPatient", first.image_orientation, other.image_orientation, 1e-4),
        ("PixelSpacing", first.pixel_spacing, other.pixel_spacing, 1e-5),
    )
    for name, ours, theirs, tolerance in pairs:
        same = ours == theirs if tolerance is None else np.allclose(ours, theirs, 1e-5, tolerance)
        if not same:
            raise InputError(
                f"All slices of a series must share one {name}; {_name(first)} has {ours}, "
                f"{_name(other)} has {theirs}.",
                where=other.path,
                do="pass the files of one stack at a time.",
            )


def _drop_duplicates(ordered: Sequence[Instance]) -> tuple[tuple[Instance, ...], tuple[str, ...]]:
    """Keep one of each set of slices at the same place; refuse those whose values differ."""
    kept = [ordered[0]]
    for instance in ordered[1:]:
        if np.linalg.norm(_position(instance) - _position(kept[-1])) > _SAME_PLACE_MM:
            kept.append(instance)
        elif not np.array_equal(read_slice(instance)[0], read_slice(kept[-1])[0]):
            raise InputError(
                f"A stack has one slice at each place; {_name(kept[-1])} and {_name(instance)} lie "
                f"0 mm apart and show different values.",
                where=instance.path,
                why="the series mixes phases, echoes or reconstructions.",
                do="pass the files of one of them.",
            )
    dropped = len(ordered) - len(kept)
    note = f"Dropped {dropped} slices that repeat another one at the same place."
    return tuple(kept), (note,) if dropped else ()


def _check_straight(ordered: Sequence[Instance]) -> None:
    """Refuse a stack whose slices shift sideways, as with a tilted gantry."""
    normal = _unit_normal(ordered[0])
    offsets = np.array([_position(item) for item in ordered]) - _position(ordered[0])
    shifts = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    worst = int(shifts.argmax())
    if shifts[worst] > _IN_PLANE_SHIFT_MM:
        angle = math.degrees(math.atan2(shifts[worst], abs(float(offsets[worst] @ normal))))
        raise InputError(
            f"Slices must be stacked along their normal; {_name(ordered[worst])} lies "
            f"{shifts[worst]:.2f} mm sideways of {_name(ordered[0])}: a tilt of "
            f"{angle:.1f} degrees.",
            where=ordered[worst].path,
            why="the gantry was tilted, or the series mixes stacks.",
            do="resample it to an upright grid (dcm2niix does) and pass the NIfTI file.",
        )


def _slice_spacing(ordered: Sequence[Instance]) -> tuple[float, tuple[str, ...]]:
    """Return the distance between slices in mm; InputError if it is uneven."""
    if len(ordered) == 1:
        return _single_slice_spacing(ordered[0])
    along = np.array([_position(item) for item in ordered]) @ _unit_normal(ordered[0])
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    worst = int(np.abs(gaps - usual).argmax())
    if abs(gaps[worst] - usual) > max(_UNEVEN_MM, _UNEVEN_FRACTION * usual):
        raise InputError(
            f"Slice spacing must be uniform; got {usual:.4g} mm in most places and "
            f"{gaps[worst]:.4g} mm between {_name(ordered[worst])} and "
            f"{_name(ordered[worst + 1])}.",
            where=ordered[worst].path.parent,
            why="slices are missing, or the series mixes stacks.",
            do="fetch the missing slices, or pass the files of one evenly spaced stack.",
        )
    spacing = float(along[-1] - along[0]) / (len(ordered) - 1)
    drift = float(np.abs(along - along[0] - spacing * np.arange(len(along))).max())
    note = (
        f"Slices lie up to {drift:.3f} mm off the even grid of {spacing:.4g} mm they were put on."
    )
    return spacing, (note,) if drift > _DRIFT_NOTE_MM else ()


def _single_slice_spacing(instance: Instance) -> tuple[float, tuple[str, ...]]:
    for name, value in (
        ("SpacingBetweenSlices", instance.spacing_between_slices),
        ("SliceThickness", instance.slice_thickness),
    ):
        if value is not None and math.isfinite(value) and value > 0:
            return value, (f"One slice: slice spacing {value:g} mm is its {name}.",)
    return 1.0, (
        "One slice without SpacingBetweenSlices or SliceThickness: spacing taken as 1 mm.",
    )


def _affine(first: Instance, spacing: float) -> Affine:
    column_direction, row_direction = _directions(first)
    between_rows, between_columns = first.pixel_spacing or (1.0, 1.0)
    return make_affine(
        _position(first),
        _unit_normal(first),
        row_direction / np.linalg.norm(row_direction),
        column_direction / np.linalg.norm(column_direction),
        (spacing, between_rows, between_columns),
    )


def _source(ordered: Sequence[Instance]) -> ScanSource:
    first = ordered[0]
    return ScanSource(
        path=Path(os.path.commonpath([item.path.parent for item in ordered])),
        modality=first.modality,
        patient_id=first.patient_id,
        study_instance_uid=first.study_instance_uid,
        series_instance_uid=first.series_instance_uid,
        frame_of_reference_uid=first.frame_of_reference_uid,
        sop_instance_uids=tuple(item.sop_instance_uid for item in ordered),
    )


def _directions(instance: Instance) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    orientation = np.array(instance.image_orientation, dtype=float)
    return orientation[:3], orientation[3:]


def _unit_normal(instance: Instance) -> NDArray[np.float64]:
    return instance.normal / np.linalg.norm(instance.normal)


def _position(instance: Instance) -> NDArray[np.float64]:
    return np.array(instance.image_position, dtype=float)


def _name(instance: Instance) -> str:
    return f"instance {instance.instance_number or '?'} ({instance.path.name})"
