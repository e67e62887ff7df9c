"""Pixels of DICOM slices: decoded, padding marked, rescaled to HU (for CT) and stacked."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError, first_line
from medvision.progress import Progress, ProgressCallback
from medvision.scans.instance import Instance

if TYPE_CHECKING:
    from pydicom import Dataset

_LOG = logging.getLogger(__name__)

AIR_HU = -1024
"""What padding outside the reconstructed field becomes in CT."""


def read_pixels(
    ordered: Sequence[Instance], on_progress: ProgressCallback
) -> tuple[NDArray, tuple[str, ...]]:
    """Stack slices of one matrix, in the order given, after rescale; and notes on the values.

    The array [slice, row, column] is int16 as long as that is exact, else float32. CT is in HU
    with its padding set to ``AIR_HU``. Raises InputError if pixels cannot be decoded.
    """
    array: NDArray = np.empty((len(ordered), ordered[0].rows, ordered[0].columns), np.int16)
    n_padding = 0
    notes: dict[str, None] = {}
    for index, instance in enumerate(ordered):
        values, padding, said = read_slice(instance)
        if array.dtype == np.int16 and not _fits_int16(values):
            array = array.astype(np.float32)
        array[index] = values
        n_padding += padding
        notes.update(dict.fromkeys(said))
        on_progress(Progress("read", index + 1, len(ordered), "slices"))
    if n_padding:
        notes[f"Set {n_padding} padding voxels (PixelPaddingValue) to {AIR_HU} HU."] = None
    return array, tuple(notes)


def read_slice(instance: Instance) -> tuple[NDArray, int, list[str]]:
    """Return values [row, column] after rescale, the number of padding voxels, and notes.

    Values follow the Modality LUT (PS3.3 C.11.1), padding C.7.5.1.1.2. Raises InputError if the
    pixels cannot be decoded.
    """
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(instance.path, force=True)
            stored = _decode(dataset, instance.path)
            padding = _padding(dataset, stored)
            values, notes = _rescale(dataset, _drop_unused_bits(dataset, stored))
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            "A slice's pixels cannot be decoded.",
            where=instance.path,
            why=first_line(error),
            do="fetch the file again, or convert it to Explicit VR Little Endian.",
        ) from error
    if instance.modality != "CT":
        return values, 0, []
    values[padding] = AIR_HU
    return values, int(padding.sum()), notes


def _decode(dataset: Dataset, path: Path) -> NDArray:
    """Return stored values [row, column]; SimpleITK decodes what pydicom has no free plugin for.

    A plugin that is there may still refuse: Pillow says it reads JPEG Extended, but not its 12 bits.
    """
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        syntax = dataset.file_meta.TransferSyntaxUID = _guess_syntax(dataset)
    try:
        stored = dataset.pixel_array
    except RuntimeError as refusal:
        # What pydicom raises where no plugin is there, and where every plugin that is there failed.
        if not syntax.is_compressed:
            raise
        _LOG.debug("%s: pydicom cannot decode %s (%s); GDCM is tried", path, syntax.name, refusal)
        stored = _decode_with_itk(dataset, path)
    if stored.shape != (dataset.Rows, dataset.Columns):
        raise ValueError(f"expected {(dataset.Rows, dataset.Columns)} pixels, got {stored.shape}")
    return stored


def _guess_syntax(dataset: Dataset) -> Any:
    """Return the uncompressed syntax in which pydicom parsed a file that has no preamble."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    implicit, little = dataset.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def _decode_with_itk(dataset: Dataset, path: Path) -> NDArray:
    """Decode through GDCM and undo the rescale that it applies."""
    import SimpleITK

    values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path), imageIO="GDCMImageIO"))
    slope, intercept = _slope_and_intercept(dataset)
    kind = "i" if dataset.PixelRepresentation else "u"
    stored = np.rint((values[0].astype(np.float64) - intercept) / slope)
    return stored.astype(f"{kind}{int(dataset.BitsAllocated) // 8}")


def _padding(dataset: Dataset, stored: NDArray) -> NDArray[np.bool_]:
    """Mark padding: PixelPaddingValue, or from it to PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = sorted(
        _as_stored(dataset, int(end)) for end in (value, value if limit is None else limit)
    )
    return (stored >= ends[0]) & (stored <= ends[1])


def _as_stored(dataset: Dataset, value: int) -> int:
    """Read a value that was written unsigned for signed pixels, as some scanners do."""
    half = 1 << (int(dataset.BitsAllocated) - 1)
    return value - 2 * half if dataset.PixelRepresentation == 1 and value >= half else value


def _drop_unused_bits(dataset: Dataset, stored: NDArray) -> NDArray:
    """Clear bits above BitsStored, which may hold overlays, and extend the sign (PS3.5 8.1.1)."""
    unused = stored.dtype.itemsize * 8 - int(dataset.get("BitsStored") or 0)
    if stored.dtype.kind not in "iu" or not 0 < unused < stored.dtype.itemsize * 8:
        return stored
    return (stored << unused) >> unused


def _rescale(dataset: Dataset, stored: NDArray) -> tuple[NDArray, list[str]]:
    """Apply the Modality LUT module (PS3.3 C.11.1) and say if CT values are not known to be HU."""
    from pydicom.pixels import apply_modality_lut

    if "ModalityLUTSequence" in dataset:
        return np.asarray(apply_modality_lut(stored, dataset)).astype(np.int64), []
    slope, intercept = _slope_and_intercept(dataset)
    notes = []
    if dataset.get("RescaleSlope") is None:
        notes.append("No RescaleSlope and RescaleIntercept: stored values taken as HU.")
    if dataset.get("RescaleType", "HU") not in ("HU", "", None):
        notes.append(f"RescaleType is {dataset.RescaleType}: values may not be HU.")
    if stored.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        return stored.astype(np.int64) * int(slope) + int(intercept), notes
    return stored * slope + intercept, notes


def _slope_and_intercept(dataset: Dataset) -> tuple[float, float]:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    pair = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    if not all(map(math.isfinite, pair)) or pair[0] == 0:
        raise ValueError(
            f"RescaleSlope and RescaleIntercept must be finite, the slope not 0; got {pair}"
        )
    return pair


def _fits_int16(values: NDArray) -> bool:
    limits = np.iinfo(np.int16)
    if values.min() < limits.min or values.max() > limits.max:
        return False
    return values.dtype.kind in "iu" or bool((values == np.rint(values)).all())
