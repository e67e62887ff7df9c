"""Volume -> a DICOM CT series, one CT Image Storage file for each slice (PS3.3 A.3)."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvision._version import __version__
from medvision.errors import InputError, UsageError
from medvision.files import atomic_path
from medvision.geometry import directions_of
from medvision.progress import Progress, ProgressCallback, ignore_progress
from medvision.scans.volume import Volume

if TYPE_CHECKING:
    from pydicom import Dataset

RESCALE_INTERCEPT = -1024
"""HU = stored value + this; with it most CT fits unsigned pixels."""

_UID_NAMESPACE = uuid.UUID("6f0c5a0e-6f0b-5a53-9d5e-3b1f2f6a7c11")
_IMPLEMENTATION_CLASS_UID = f"2.25.{uuid.uuid5(_UID_NAMESPACE, 'implementation').int}"

_FROM_VOLUME = frozenset(
    {
        "SOPClassUID",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
        "Modality",
        "InstanceNumber",
        "PatientID",
        "Rows",
        "Columns",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
        "PixelData",
        "PixelPaddingValue",
        "PixelPaddingRangeLimit",
        "PixelSpacing",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "SpacingBetweenSlices",
        "SliceLocation",
        "RescaleSlope",
        "RescaleIntercept",
        "RescaleType",
    }
)
"""What ``attributes`` may not set: it follows from the volume or the other arguments."""


@dataclass(frozen=True)
class _SeriesUids:
    study: str
    series: str
    frame_of_reference: str
    instances: tuple[str, ...]


def write_ct_series(
    volume: Volume,
    folder: str | Path,
    *,
    patient_id: str,
    series_description: str = "",
    series_number: int = 1,
    original: bool = False,
    attributes: Mapping[str, Any] | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> list[Path]:
    """Write ``volume`` (whole HU) as ``folder/IM0001.dcm``, ...; return the paths in slice order.

    The study and the frame of reference are the source's where it has them. Series and instances
    are new, with UIDs that depend only on the content and the arguments, unless ``original`` says
    that these are the source's own images. ``attributes`` adds others by DICOM keyword, such as
    BodyPartExamined (with Laterality if it is one of a pair); PatientName and the like stay empty
    otherwise.
    Raises InputError for values that are not whole or do not fit 16 bits, or axes not at right
    angles; UsageError if the folder holds such a series already or an attribute may not be set.
    """
    folder = Path(folder)
    extra = dict(attributes or {})
    _check_attributes(extra)
    _check_folder(folder)
    stored = _stored_values(volume)
    salt = repr((patient_id, series_description, series_number, sorted(extra.items())))
    uids = _make_uids(volume, stored, salt, original)
    common = {
        **_common_attributes(volume, stored, uids, original),
        **_laterality(extra),
        "PatientID": patient_id,
        "SeriesDescription": series_description,
        "SeriesNumber": series_number,
    }
    paths = []
    for index in range(len(stored)):
        path = folder / f"IM{index + 1:04d}.dcm"
        _write(path, {**common, **_slice_attributes(volume, stored, uids, index), **extra})
        paths.append(path)
        on_progress(Progress("write", index + 1, len(stored), "slices"))
    return paths


def _check_attributes(extra: Mapping[str, Any]) -> None:
    from pydicom.datadict import tag_for_keyword

    for keyword in extra:
        if keyword in _FROM_VOLUME or tag_for_keyword(keyword) is None:
            raise UsageError(
                f"An extra attribute must be a DICOM keyword that does not follow from the volume; "
                f"got {keyword!r}.",
                do="leave it out.",
            )


def _check_folder(folder: Path) -> None:
    if any(folder.glob("IM*.dcm")):
        raise UsageError(
            "A series is written to a folder without IM*.dcm files.",
            where=folder,
            do="choose another folder, or remove the old series.",
        )


def _laterality(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return an empty Laterality where the body part may be one of a pair (PS3.3 C.7.3.1)."""
    return {} if extra.get("BodyPartExamined") else {"Laterality": None}


def _stored_values(volume: Volume) -> NDArray:
    """Return the values to store, all unsigned if they fit, else all signed 16 bit."""
    array = volume.array
    if array.dtype.kind == "f" and not (
        np.isfinite(array).all() and (array == np.rint(array)).all()
    ):
        raise InputError(
            "A CT series holds whole HU; some voxels are not.",
            do="round the array to whole HU first.",
        )
    low, high = int(array.min()) - RESCALE_INTERCEPT, int(array.max()) - RESCALE_INTERCEPT
    for kind in (np.uint16, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return (array.astype(np.int64) - RESCALE_INTERCEPT).astype(kind)
    raise InputError(
        f"CT values must fit 16 bits with intercept {RESCALE_INTERCEPT}; got "
        f"{array.min()} to {array.max()} HU.",
        do="clip the array to the HU that matter.",
    )


def _make_uids(volume: Volume, stored: NDArray, salt: str, original: bool) -> _SeriesUids:
    source = volume.source
    digest = hashlib.sha256(f"{salt}|{stored.shape}|{stored.dtype}|{original}".encode())
    digest.update(np.ascontiguousarray(volume.affine).tobytes())
    digest.update(np.ascontiguousarray(stored).tobytes())
    digest.update(f"{source.study_instance_uid}|{source.series_instance_uid}".encode())
    seed = digest.hexdigest()
    series = source.series_instance_uid if original else ""
    instances = source.sop_instance_uids if original else ()
    if len(instances) != len(stored):
        instances = tuple(_uid(seed, f"instance {index}") for index in range(len(stored)))
    return _SeriesUids(
        source.study_instance_uid or _uid(seed, "study"),
        series or _uid(seed, "series"),
        source.frame_of_reference_uid or _uid(seed, "frame of reference"),
        instances,
    )


def _uid(seed: str, role: str) -> str:
    """Return a UID under 2.25, which a UUID makes unique without a registry (PS3.5 B.2)."""
    return f"2.25.{uuid.uuid5(_UID_NAMESPACE, f'{seed}|{role}').int}"


def _common_attributes(
    volume: Volume, stored: NDArray, uids: _SeriesUids, original: bool
) -> dict[str, Any]:
    """Return what all slices share, by module of the CT Image IOD (PS3.3 A.3.3)."""
    slice_spacing, row_spacing, column_spacing = volume.spacing_mm
    empty = (
        "PatientName PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber "
        "ReferringPhysicianName PositionReferenceIndicator Manufacturer AcquisitionNumber KVP "
        "PatientPosition"
    )
    return {
        **dict.fromkeys(empty.split(" "), None),
        "SpecificCharacterSet": "ISO_IR 192",
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "StudyInstanceUID": uids.study,
        "SeriesInstanceUID": uids.series,
        "FrameOfReferenceUID": uids.frame_of_reference,
        "Modality": "CT",
        "ImageType": ["ORIGINAL" if original else "DERIVED", "PRIMARY", "AXIAL"],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[1],
        "Columns": stored.shape[2],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        "PixelSpacing": [_decimal(row_spacing), _decimal(column_spacing)],
        "ImageOrientationPatient": [_decimal(one) for one in _orientation(volume)],
        "SliceThickness": _decimal(slice_spacing),
        "SpacingBetweenSlices": _decimal(slice_spacing),
        "RescaleSlope": "1",
        "RescaleIntercept": str(RESCALE_INTERCEPT),
        "RescaleType": "HU",
    }


def _orientation(volume: Volume) -> list[float]:
    """Return ImageOrientationPatient: the way of the column index, then of the row index."""
    directions = directions_of(volume.affine)
    if np.abs(directions.T @ directions - np.eye(3)).max() > 1e-4:
        raise InputError(
            "A CT series needs slice, row and column axes at right angles.",
            do="resample the volume to an upright grid first.",
        )
    return [*directions[:, 2].tolist(), *directions[:, 1].tolist()]


def _slice_attributes(
    volume: Volume, stored: NDArray, uids: _SeriesUids, index: int
) -> dict[str, Any]:
    position = volume.index_to_patient([index, 0, 0])
    orientation = _orientation(volume)
    normal = np.cross(orientation[:3], orientation[3:])
    return {
        "SOPInstanceUID": uids.instances[index],
        "InstanceNumber": index + 1,
        "ImagePositionPatient": [_decimal(one) for one in position],
        "SliceLocation": _decimal(float(position @ normal)),
        "PixelData": stored[index].astype(stored.dtype.newbyteorder("<")).tobytes(),
    }


def _decimal(value: float) -> str:
    """Return a number as a Decimal String of at most 16 characters (PS3.5 6.2)."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(round(float(value), 10) + 0.0)


def _write(path: Path, attributes: Mapping[str, Any]) -> None:
    from pydicom.uid import UID, ExplicitVRLittleEndian

    dataset = _dataset(attributes)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = UID(_IMPLEMENTATION_CLASS_UID)
    dataset.file_meta.ImplementationVersionName = f"MEDVISION {__version__}"[:16]
    with atomic_path(path) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


def _dataset(attributes: Mapping[str, Any]) -> Dataset:
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset

    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    return dataset
