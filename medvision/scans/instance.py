"""One DICOM file -> its header: told by content, read without pixels."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

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
