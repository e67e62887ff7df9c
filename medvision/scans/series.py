"""DICOM files -> series: found by content, read by header, grouped, ordered, chosen."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

_HEADER_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "Modality",
    "SeriesNumber",
    "SeriesDescription",
    "InstanceNumber",
    "ImageType",
    "NumberOfFrames",
    "SamplesPerPixel",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
)

_OBJECTS_ON_SCANS = frozenset({"SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG"})
"""Modalities of objects that describe a scan and are none, even where they hold pixels."""


class Skipped(NamedTuple):
    """A file (or the folder of a series) that was left out, and the reason in a few words."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Instance:
    """The header of one DICOM object, without pixels; a missing attribute is None or "".

    ``image_orientation`` is ImageOrientationPatient: the direction of increasing column index, then
    of increasing row index (PS3.3 C.7.6.2.1.1). ``pixel_spacing`` is between rows, between columns.
    """

    path: Path
    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str = ""
    frame_of_reference_uid: str = ""
    patient_id: str = field(default="", repr=False)
    modality: str = ""
    series_number: str = ""
    series_description: str = ""
    instance_number: str = ""
    image_type: tuple[str, ...] = ()
    frames: int = 1
    samples: int = 1
    rows: int = 0
    columns: int = 0
    image_position: tuple[float, ...] | None = None
    image_orientation: tuple[float, ...] | None = None
    pixel_spacing: tuple[float, ...] | None = None
    slice_thickness: float | None = None
    spacing_between_slices: float | None = None

    @property
    def is_placed(self) -> bool:
        """Whether the header says where in the patient the image lies."""
        return self.image_position is not None and self.image_orientation is not None

    @property
    def normal(self) -> NDArray[np.float64]:
        """The image's normal: column direction x row direction; only where ``is_placed``."""
        orientation = np.array(self.image_orientation, dtype=float)
        return np.cross(orientation[:3], orientation[3:])

    @property
    def why_no_slice(self) -> str | None:
        """Say why this object is no slice of a scan, or None if it is one."""
        if self.modality in _OBJECTS_ON_SCANS or not self.rows or not self.columns:
            return f"{self.modality or 'an object'} without an image of the patient"
        if "LOCALIZER" in self.image_type:
            return "localizer"
        if self.frames > 1:
            return "multi-frame object, which medvision does not read yet"
        if self.samples != 1:
            return "colour image"
        return None


@dataclass(frozen=True)
class Series:
    """The slices of one DICOM series in spatial order, at least one."""

    instances: tuple[Instance, ...]

    @property
    def first(self) -> Instance:
        """The first slice; what is the same in the whole series is read from it."""
        return self.instances[0]

    @property
    def series_instance_uid(self) -> str:
        """SeriesInstanceUID."""
        return self.first.series_instance_uid

    @property
    def folder(self) -> Path:
        """The deepest folder that holds every file."""
        return Path(os.path.commonpath([instance.path.parent for instance in self.instances]))

    @property
    def is_volume_like(self) -> bool:
        """Whether every slice says where it lies."""
        return all(instance.is_placed for instance in self.instances)

    @property
    def is_axial_ct(self) -> bool:
        """Whether these are CT slices that lie rather across the body than along it."""
        if self.first.modality != "CT" or not self.is_volume_like:
            return False
        return int(np.abs(self.first.normal).argmax()) == 2

    @property
    def n_voxels(self) -> int:
        """Slices x rows x columns."""
        return len(self.instances) * self.first.rows * self.first.columns

    def describe(self) -> str:
        """Return number, description, modality, slices and UID on one line."""
        first = self.first
        name = f"series {first.series_number or '?'} {first.series_description!r}"
        return (
            f"{name}: {first.modality}, {len(self.instances)} slices, {first.series_instance_uid}"
        )


def looks_like_dicom(path: Path) -> bool:
    """Tell by its first bytes whether a file may be DICOM, whatever its name (PS3.10 7.1).

    Files without the preamble are taken if they start with an element of group 0002 or 0008.
    """
    with path.open("rb") as stream:
        head = stream.read(132)
    if head[128:] == b"DICM":
        return True
    return len(head) == 132 and head[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08")


def read_instance(path: Path) -> Instance:
    """Read one header. Raises InputError if the file is no DICOM object of a series."""
    import pydicom

    try:
        if not looks_like_dicom(path):
            raise InputError("not a DICOM file", where=path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(
                path, stop_before_pixels=True, force=True, specific_tags=list(_HEADER_KEYWORDS)
            )
            return _instance_of(path, header)
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"cannot be opened: {error.strerror}", where=path) from error
    except Exception as error:
        raise InputError("unreadable DICOM header", where=path, why=str(error)) from error


def _instance_of(path: Path, header: Dataset) -> Instance:
    uids = _text(header, "SOPInstanceUID"), _text(header, "SeriesInstanceUID")
    if not all(uids):
        raise InputError("DICOM file that belongs to no series (DICOMDIR or damaged)", where=path)
    return Instance(
        path,
        *uids,
        study_instance_uid=_text(header, "StudyInstanceUID"),
        frame_of_reference_uid=_text(header, "FrameOfReferenceUID"),
        patient_id=_text(header, "PatientID"),
        modality=_text(header, "Modality"),
        series_number=_text(header, "SeriesNumber"),
        series_description=_text(header, "SeriesDescription"),
        instance_number=_text(header, "InstanceNumber"),
        image_type=_image_type(header),
        frames=int(header.get("NumberOfFrames") or 1),
        samples=int(header.get("SamplesPerPixel") or 1),
        rows=int(header.get("Rows") or 0),
        columns=int(header.get("Columns") or 0),
        image_position=_numbers(header, "ImagePositionPatient", 3),
        image_orientation=_numbers(header, "ImageOrientationPatient", 6),
        pixel_spacing=_numbers(header, "PixelSpacing", 2),
        slice_thickness=_number(header, "SliceThickness"),
        spacing_between_slices=_number(header, "SpacingBetweenSlices"),
    )


def find_instances(files: Iterable[Path]) -> tuple[list[Instance], list[Skipped]]:
    """Read the header of every file; what is unreadable or no DICOM is skipped, with its reason."""
    instances, skipped = [], []
    for path in files:
        try:
            instances.append(read_instance(path))
        except InputError as error:
            skipped.append(Skipped(path, error.what))
    return instances, skipped


def group_series(instances: Iterable[Instance]) -> tuple[list[Series], list[Skipped]]:
    """Group slices by SeriesInstanceUID; localizers, reports and the like are left out."""
    slices: defaultdict[str, list[Instance]] = defaultdict(list)
    others: Counter[tuple[Path, str, str]] = Counter()
    for instance in instances:
        reason = instance.why_no_slice
        if reason is None:
            slices[instance.series_instance_uid].append(instance)
        else:
            name = f"series {instance.series_number or '?'} {instance.series_description!r}"
            others[instance.path.parent, name, reason] += 1
    skipped = [
        Skipped(folder, f"{name}: {count} x {reason}")
        for (folder, name, reason), count in others.items()
    ]
    return [Series(order_instances(group)) for group in slices.values()], skipped


def order_instances(instances: Iterable[Instance]) -> tuple[Instance, ...]:
    """Order slices along their normal, lowest first (PS3.3 C.7.6.2.1.1); never by number.

    Names only break ties and order slices of which one does not say where it lies.
    """
    by_name = sorted(instances, key=lambda instance: str(instance.path))
    if not all(instance.is_placed for instance in by_name):
        return tuple(by_name)
    normal = by_name[0].normal
    return tuple(sorted(by_name, key=lambda instance: float(_position(instance) @ normal)))


def choose_series(
    found: Sequence[Series], wanted: str | int | None, where: Path
) -> tuple[Series, tuple[str, ...]]:
    """Return the series to read and notes on the choice.

    ``wanted`` is a SeriesInstanceUID, a SeriesNumber or a SeriesDescription. Without it the only
    series that can be a volume is taken, else the axial CT with most voxels if there is just one
    such and all series are of one patient. Raises InputError, listing the series, otherwise.
    """
    if wanted is not None:
        matches = list(_matching(found, str(wanted)))
        if len(matches) == 1:
            return matches[0], ()
        raise _undecided(found, f"{len(matches)} series match {str(wanted)!r}", where)
    candidates = [series for series in found if series.is_volume_like] or list(found)
    if len(candidates) == 1:
        return candidates[0], _note_on_choice(candidates[0], found)
    return _largest_axial_ct(candidates, found, where)


def _largest_axial_ct(
    candidates: list[Series], found: Sequence[Series], where: Path
) -> tuple[Series, tuple[str, ...]]:
    if len({series.first.patient_id for series in candidates}) > 1:
        raise _undecided(candidates, "The series are of more than one patient", where)
    axial = sorted(
        (series for series in candidates if series.is_axial_ct), key=lambda series: -series.n_voxels
    )
    if not axial:
        raise _undecided(candidates, f"{len(candidates)} series could be meant", where)
    if len(axial) > 1 and axial[0].n_voxels == axial[1].n_voxels:
        raise _undecided(candidates, "Several axial CT series are the largest", where)
    return axial[0], _note_on_choice(axial[0], found)


def _note_on_choice(chosen: Series, found: Sequence[Series]) -> tuple[str, ...]:
    others = [series.describe() for series in found if series is not chosen]
    if not others:
        return ()
    return (f"Read {chosen.describe()}; left aside {'; '.join(others)}.",)


def _matching(found: Sequence[Series], wanted: str) -> Iterator[Series]:
    for name in ("series_instance_uid", "series_number", "series_description"):
        matches = [
            series
            for series in found
            if getattr(series.first, name).strip().casefold() == wanted.strip().casefold()
        ]
        if matches:
            yield from matches
            return


def _undecided(found: Sequence[Series], problem: str, where: Path) -> InputError:
    listing = "\n    ".join(series.describe() for series in found)
    return InputError(
        f"One series must be chosen. {problem}.",
        where=where,
        why=f"found\n    {listing}" if found else "found no series",
        do="name one by its UID, number or description (series=...).",
    )


def _position(instance: Instance) -> NDArray[np.float64]:
    return np.array(instance.image_position, dtype=float)


def _text(header: Dataset, keyword: str) -> str:
    value = header.get(keyword)
    return "" if value is None else str(value).strip()


def _image_type(header: Dataset) -> tuple[str, ...]:
    value = header.get("ImageType") or ()
    parts = [value] if isinstance(value, str) else value
    return tuple(str(part).strip().upper() for part in parts)


def _number(header: Dataset, keyword: str) -> float | None:
    value = header.get(keyword)
    return None if value in (None, "") else float(value)


def _numbers(header: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    value = header.get(keyword)
    if value is None or value == "" or len(value) != count:
        return None
    numbers = tuple(float(number) for number in value)
    return numbers if all(math.isfinite(number) for number in numbers) else None
