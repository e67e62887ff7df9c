"""The sample's CT in standard axial order, its lungs, and the noise that is its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvision import geometry
from medvision.errors import InputError
from medvision.geometry import Box
from medvision.scans.images import read_image
from medvision.scans.volume import ScanSource, Volume

_EROSION_PX = 2
_LOCAL_SIGMA_PX = 2.0
_OUTLIER_SIGMAS = 2.5


@dataclass(frozen=True)
class Lung:
    """One lung in the CT's grid: the box it fills, its mask, and the mask without its rim."""

    box: Box
    mask: NDArray[np.bool_]
    core: NDArray[np.bool_]


@dataclass(frozen=True)
class Chest:
    """The CT in HU, rows growing to the back, columns to the left, slices to the head.

    ``local_hu`` is its in-plane local mean, ``noise_hu`` what is left, without vessels and edges.
    """

    volume: Volume
    local_hu: NDArray[np.float32]
    noise_hu: NDArray[np.float32]
    right: Lung
    left: Lung


def read_axial(path: Path) -> Volume:
    """Read a volume file as ``[slice, row, column]`` with indices growing along +z, +y, +x of LPS.

    The sample's CT stores its rows from the back to the front; this turns them round together with
    the affine, so that no voxel moves in the patient. Raises InputError if the grid is not axial.
    """
    volume = read_image(path)
    array, affine = volume.array, volume.affine.copy()
    steps = affine[:3, :3][::-1]
    if not np.allclose(steps, np.diag(np.diag(steps)), atol=1e-6):
        raise InputError("The CT's axes must be parallel to the patient's.", where=path)
    for axis in range(3):
        if steps[axis, axis] < 0:
            last = np.zeros(3)
            last[axis] = array.shape[axis] - 1
            affine[:3, 3] = geometry.index_to_patient(affine, last)
            affine[:3, axis] *= -1
            array = np.flip(array, axis)
    return replace(volume, array=np.ascontiguousarray(array), affine=affine)


def read_chest(
    ct: Path,
    organs: Path,
    right_labels: tuple[int, ...],
    left_labels: tuple[int, ...],
    source: ScanSource,
) -> Chest:
    """Read the CT and its organ labels; InputError if they do not share one grid."""
    scan, labels = read_axial(ct), read_axial(organs)
    if labels.shape != scan.shape or not geometry.same_grid(scan.affine, labels.affine, scan.shape):
        raise InputError("The organ labels must lie on the CT's grid.", where=organs)
    volume = Volume(np.rint(scan.array).astype(np.int16), scan.affine, source)
    right, left = find_lung(labels.array, right_labels), find_lung(labels.array, left_labels)
    return make_chest(volume, right, left)


def make_chest(volume: Volume, right: Lung, left: Lung) -> Chest:
    """Split the CT into local mean and noise; the noise level is measured in both lungs."""
    from scipy.ndimage import gaussian_filter

    hu = volume.array.astype(np.float32)
    local = gaussian_filter(hu, (0, _LOCAL_SIGMA_PX, _LOCAL_SIGMA_PX))
    noise = clean_noise(hu - local, right.core | left.core)
    return Chest(volume, local, noise, right, left)


def find_lung(labels: NDArray, values: tuple[int, ...]) -> Lung:
    """Join lobes to a lung, fissures closed; InputError if the labels hold none of ``values``."""
    from scipy.ndimage import binary_closing, binary_erosion, find_objects

    mask = np.isin(labels, values)
    window = find_objects(mask.astype(np.uint8))
    if not window:
        raise InputError(f"The organ labels must hold the lung lobes {values}; they hold none.")
    disk = _disk(_EROSION_PX)[None]
    padded = np.pad(mask[window[0]], ((0, 0), (4, 4), (4, 4)))
    closed = binary_closing(padded, disk)
    core = np.zeros_like(mask)
    core[window[0]] = binary_erosion(closed, disk)[:, 4:-4, 4:-4]
    mask[window[0]] |= closed[:, 4:-4, 4:-4]
    edges = [axis.start for axis in window[0]] + [axis.stop for axis in window[0]]
    return Lung(Box(*edges), mask, core)


def clean_noise(residual: NDArray[np.float32], inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the residual with vessels and edges exchanged for noise from elsewhere in the slice.

    A value beyond 2.5 robust standard deviations of the parenchyma is structure, not noise. Cutting
    it off at the limit would leave a vessel's shape behind, so another place's value is put there.
    """
    deviation = 1.4826 * float(np.median(np.abs(residual[inside])))
    limit = _OUTLIER_SIGMAS * deviation
    clean = np.where(np.abs(residual) > limit, np.nan, residual)
    for shift in ((7, 11), (-13, 5), (19, -17), (-23, -29)):
        clean = np.where(np.isnan(clean), np.roll(clean, shift, axis=(1, 2)), clean)
    return np.nan_to_num(clean, nan=0.0).astype(np.float32)


def _disk(radius: int) -> NDArray[np.bool_]:
    steps = np.arange(-radius, radius + 1)
    return steps[:, None] ** 2 + steps[None, :] ** 2 <= radius**2
