"""Decode one small image in each transfer syntax and compare it with the pixels that are known."""

from __future__ import annotations

import base64
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medvision.diagnosis import Check
from medvision.doctor_samples import ENCODED_SAMPLES
from medvision.scans.load import read_scan

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_UNCOMPRESSED = {
    "1.2.840.10008.1.2": "Implicit little endian",
    "1.2.840.10008.1.2.1": "Explicit little endian",
    "1.2.840.10008.1.2.2": "Explicit big endian",
    "1.2.840.10008.1.2.1.99": "Deflated",
}
_REMEDY = (
    "Install medvision's decoders again: python -m pip install --force-reinstall "
    "pydicom pylibjpeg pylibjpeg-openjpeg pylibjpeg-rle pyjpegls SimpleITK"
)


def known_images() -> dict[str, NDArray[np.uint16]]:
    """Return the images that the samples show, ``[row, column]``, 12 x 16, in grey levels."""
    row, column = np.mgrid[0:12, 0:16]
    images = {
        "wide": 40 * row + 7 * column + 5 * (row * column % 3),
        "smooth": 40 * row + 7 * column,
        "gentle": 9 * row + 10 * column,
    }
    return {name: image.astype(np.uint16) for name, image in images.items()}


def check_transfer_syntaxes() -> Iterable[Check]:
    """Write a sample in every transfer syntax and read it as a scan is read; UIDs as in PS3.6."""
    with tempfile.TemporaryDirectory(prefix="medvision-doctor-") as folder:
        for name, path, image, tolerance in write_samples(Path(folder)):
            yield _check_one(name, path, image, tolerance)


def _check_one(name: str, path: Path, image: NDArray[np.uint16], tolerance: int) -> Check:
    try:
        with _silent_libraries():
            pixels = read_scan(path).array[0]
        if pixels.shape != image.shape:
            raise ValueError(f"shape {pixels.shape}, expected {image.shape}")
        difference = int(np.abs(pixels.astype(np.int64) - image).max())
    except (KeyboardInterrupt, SystemExit):
        raise
    # Decoders fail in ways of their own: a panic in Rust is not even an Exception.
    except BaseException as error:
        reason = getattr(error, "why", None) or str(error) or type(error).__name__
        return Check(name, "failed", reason.splitlines()[0][:120], _REMEDY)
    if difference > tolerance:
        detail = f"wrong pixels, off by {difference} grey levels"
        return Check(name, "failed", detail, _REMEDY)
    return Check(name, "ok", "exact" if tolerance == 0 else f"lossy, off by at most {difference}")


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Drop what C libraries write to stderr: one decoder's refusal, after which the next one decodes."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def write_samples(folder: Path) -> Iterator[tuple[str, Path, NDArray[np.uint16], int]]:
    """Yield for each transfer syntax its name, a DICOM file, what it shows, and the tolerance."""
    images = known_images()
    for uid, name in _UNCOMPRESSED.items():
        dataset = _dataset(uid, images["wide"], bits=16)
        pixels = images["wide"].astype(">u2" if uid.endswith(".1.2.2") else "<u2")
        dataset.PixelData = pixels.tobytes()
        dataset["PixelData"].VR = "OW"
        yield f"{name} ({uid})", _save(dataset, folder), images["wide"], 0
    for sample in ENCODED_SAMPLES:
        from pydicom.encaps import encapsulate

        uid = sample.transfer_syntax_uid
        bits = {"wide": 16, "smooth": 12, "gentle": 8}[sample.image]
        dataset = _dataset(uid, images[sample.image], bits)
        dataset.PixelData = encapsulate([base64.b64decode(sample.frame_base64)])
        dataset["PixelData"].VR = "OB"
        path = _save(dataset, folder)
        yield f"{sample.name} ({uid})", path, images[sample.image], sample.tolerance


def _dataset(uid: str, image: NDArray[np.uint16], bits: int) -> Dataset:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, CTImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(uid)
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.SeriesInstanceUID = generate_uid()
    dataset.Modality = "CT"
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.ImagePositionPatient = [0, 0, 0]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [1, 1]
    dataset.SliceThickness = 1
    dataset.Rows, dataset.Columns = image.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 8 if bits == 8 else 16
    dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = 0
    return dataset


def _save(dataset: Dataset, folder: Path) -> Path:
    path = folder / f"{dataset.file_meta.TransferSyntaxUID}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path
