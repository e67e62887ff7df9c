"""Volume files: NIfTI through nibabel, MetaImage and NRRD through SimpleITK."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError, UsageError
from medvision.files import atomic_path
from medvision.geometry import (
    Affine,
    affine_from_nifti,
    affine_to_nifti,
    directions_of,
    make_affine,
    same_grid,
)
from medvision.scans.volume import ScanSource, Volume

if TYPE_CHECKING:
    import SimpleITK

IMAGE_KINDS = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".mha": "metaimage",
    ".mhd": "metaimage",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
}
"""File name endings that are read as volumes, and the kind each one is."""

MAX_BYTES = 4 * 2**30
MAX_COMPRESSION = 2000
"""Deflate packs at most about 1 to 1032; a header that declares more is damaged or hostile."""

_DETACHED = (".mhd", ".nhdr")
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}


def image_suffix(path: Path) -> str | None:
    """Return the ending of ``path`` that is in ``IMAGE_KINDS``, or None."""
    name = path.name.lower()
    return next((suffix for suffix in IMAGE_KINDS if name.endswith(suffix)), None)


def read_image(path: str | Path) -> Volume:
    """Read a NIfTI, MetaImage or NRRD file as a volume in LPS mm; values are kept as they are.

    Integers become int16 where they fit, else int32 or float32; floats become float32. Raises
    UsageError if the file is missing or of another kind; InputError if it is damaged, declares
    more than 4 GiB or 2000 times its own size, is no single 3-D image, or holds NaN or infinity.
    """
    path = Path(path)
    suffix = image_suffix(path)
    if suffix is None or not path.is_file():
        raise UsageError(
            f"A volume file must exist and end in {', '.join(IMAGE_KINDS)}.", where=path
        )
    read = _read_nifti if IMAGE_KINDS[suffix] == "nifti" else _read_itk
    try:
        array, affine, notes = read(path)
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            "The volume file cannot be read.",
            where=path,
            why=str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__,
            do="copy or convert it again from its source.",
        ) from error
    return Volume(_checked(array, path), affine, ScanSource(path=path), tuple(notes))


def write_image(path: str | Path, volume: Volume) -> None:
    """Write ``volume`` atomically to a .nii, .nii.gz, .mha or .nrrd file, at its place in LPS.

    Raises UsageError for another ending.
    """
    path = Path(path)
    suffix = image_suffix(path)
    if suffix is None or suffix in _DETACHED:
        raise UsageError(
            "A volume is written to one .nii, .nii.gz, .mha or .nrrd file.",
            where=path,
            do="choose one of these endings.",
        )
    write = _write_nifti if IMAGE_KINDS[suffix] == "nifti" else _write_itk
    with atomic_path(path) as temporary:
        write(temporary, volume)


def _read_nifti(path: Path) -> tuple[NDArray, Affine, list[str]]:
    import nibabel

    image: Any = nibabel.load(path)
    shape = _three_dimensions(image.shape, path)
    _check_declared_size(path, image.shape, image.get_data_dtype().itemsize)
    nifti_affine, notes = _nifti_affine(image.header, shape)
    array = np.asanyarray(image.dataobj).reshape(shape).T
    if image.get_data_dtype().kind in "iu" and array.dtype.kind == "f":
        array = _whole_if_exact(array)
    return array, affine_from_nifti(nifti_affine), notes


def _nifti_affine(header: Any, shape: tuple[int, ...]) -> tuple[NDArray[np.float64], list[str]]:
    """Return the affine to RAS mm: NIfTI-1 method 3 (sform), else 2 (qform), else 1 (sizes)."""
    sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    notes = []
    if sform is not None:
        affine = sform
        if qform is not None and not same_grid(sform, qform, shape):
            notes.append("The file's sform and qform disagree; the sform was taken.")
    elif qform is not None:
        affine = qform
    else:
        affine = np.diag([*header.get_zooms()[:3], *[1.0] * (4 - min(len(header.get_zooms()), 3))])
        notes.append("The file has neither sform nor qform: position and left/right are unknown.")
    unit = header.get_xyzt_units()[0]
    factor = _MM_PER_UNIT.get(unit, 1.0)
    if factor != 1:
        notes.append(f"Lengths were in {unit} and were turned into mm.")
    return np.diag([factor, factor, factor, 1.0]) @ affine, notes


def _whole_if_exact(array: NDArray) -> NDArray:
    """Return int32 if scaling left whole numbers only, as slope 1 and intercept -1024 do."""
    limit = np.iinfo(np.int32).max
    if not np.isfinite(array).all() or np.abs(array).max(initial=0) > limit:
        return array
    whole = np.rint(array)
    return whole.astype(np.int32) if (whole == array).all() else array


def _read_itk(path: Path) -> tuple[NDArray, Affine, list[str]]:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    size = reader.GetSize()
    if reader.GetNumberOfComponents() != 1:
        raise _no_single_image((*size, reader.GetNumberOfComponents()), path)
    _three_dimensions(size, path)
    _check_declared_size(path, size, _itk_item_size(reader.GetPixelIDValue()))
    image = reader.Execute()
    if len(size) == 4:
        image = image[:, :, :, 0]
    elif len(size) == 2:
        image = SimpleITK.JoinSeries([image])
    return SimpleITK.GetArrayFromImage(image), _itk_affine(image), []


def _itk_item_size(pixel_id: int) -> int:
    import SimpleITK

    return SimpleITK.Image([1, 1], pixel_id).GetSizeOfPixelComponent()


def _itk_affine(image: SimpleITK.Image) -> Affine:
    """Return our affine; SimpleITK gives (column, row, slice) axes, always in LPS."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    columns, rows, slices = direction.T
    return make_affine(image.GetOrigin(), slices, rows, columns, image.GetSpacing()[::-1])


def _write_nifti(path: Path, volume: Volume) -> None:
    import nibabel

    affine = affine_to_nifti(volume.affine)
    image = nibabel.Nifti1Image(_writable(volume.array).T, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner" if _is_orthogonal(volume.affine) else "unknown")
    nibabel.save(image, path)


def _write_itk(path: Path, volume: Volume) -> None:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(_writable(volume.array)))
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetSpacing(volume.spacing_mm[::-1])
    image.SetDirection(directions_of(volume.affine)[:, ::-1].ravel().tolist())
    SimpleITK.WriteImage(image, str(path), useCompression=True)


def _is_orthogonal(affine: Affine) -> bool:
    directions = directions_of(affine)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() < 1e-5)


def _writable(array: NDArray) -> NDArray:
    """Return the array in a type that every reader of these formats knows."""
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        return _smallest_integer(array)
    return array


def _three_dimensions(shape: Sequence[int], path: Path) -> tuple[int, int, int]:
    """Return the size of the one 3-D image in a file of ``shape``; a 2-D image is one slice."""
    sizes = [*(int(size) for size in shape), 1][: max(3, len(shape))]
    if len(sizes) < 3 or any(size != 1 for size in sizes[3:]) or min(sizes) < 1:
        raise _no_single_image(shape, path)
    return sizes[0], sizes[1], sizes[2]


def _no_single_image(shape: Sequence[int], path: Path) -> InputError:
    return InputError(
        f"A volume file must hold one 3-D image of single values; got size {tuple(shape)}.",
        where=path,
        do="split time points or channels into a file each.",
    )


def _check_declared_size(path: Path, shape: Sequence[int], item_size: int) -> None:
    """Refuse, before memory is taken, a size that cannot be meant."""
    declared = math.prod(int(size) for size in shape) * item_size
    limit = MAX_BYTES
    if image_suffix(path) not in _DETACHED:
        limit = min(limit, path.stat().st_size * MAX_COMPRESSION)
    if declared > limit:
        raise InputError(
            f"A volume may take up to {limit} bytes here; the header declares {declared}.",
            where=path,
            why=f"size {tuple(shape)} in a file of {path.stat().st_size} bytes.",
            do="check the file, or crop or resample the scan.",
        )


def _checked(array: NDArray, path: Path) -> NDArray:
    """Return int16 where exact, else int32 or float32; refuse other kinds, NaN and infinity."""
    if array.dtype.kind in "iu":
        return _smallest_integer(array)
    if array.dtype.kind != "f":
        raise InputError(f"Voxels must be real numbers; got {array.dtype}.", where=path)
    if not np.isfinite(array).all():
        raise InputError(
            f"Voxels must be finite; {int((~np.isfinite(array)).sum())} are NaN or infinite.",
            where=path,
            do="fill them (air is -1024 HU in CT) and write the file again.",
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def _smallest_integer(array: NDArray) -> NDArray:
    low, high = int(array.min()), int(array.max())
    for kind in (np.int16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.ascontiguousarray(array, dtype=kind)
    return np.ascontiguousarray(array, dtype=np.float32)
