"""Affine mathematics between voxel indices and patient millimetres.

Conventions, used everywhere in medvision:

* Voxel arrays are indexed ``[slice, row, column]``. An index names a voxel's *centre*: voxel
  ``(0, 0, 0)`` has its centre at index ``(0.0, 0.0, 0.0)`` and reaches from -0.5 to +0.5.
* Patient space is DICOM's LPS in millimetres: +x to the patient's left, +y to the back
  (posterior), +z to the head (superior) (DICOM PS3.3 C.7.6.2.1.1).
* Boxes are half-open in voxel *edges*: edge ``e`` lies at index ``e - 0.5``, so that voxel ``i``
  is the box ``[i, i + 1)`` and ``array[box.slices]`` are exactly its voxels.
* An affine is a 4 x 4 matrix that takes ``(slice, row, column, 1)`` to ``(x, y, z, 1)`` mm.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvision.errors import InputError

PATIENT_FRAME = "LPS"
"""Name of the patient frame of every millimetre in medvision and in the files it writes."""

Affine = NDArray[np.float64]


@dataclass(frozen=True)
class Box:
    """A 3-D box in voxel edges, half-open: ``slice_min <= slice < slice_max``, same for the rest.

    Edges may be fractional. Raises InputError unless every min is below its max and all are finite.
    """

    slice_min: float
    row_min: float
    column_min: float
    slice_max: float
    row_max: float
    column_max: float

    def __post_init__(self) -> None:
        edges = np.array(astuple(self), dtype=float)
        if not np.isfinite(edges).all() or not (edges[:3] < edges[3:]).all():
            raise InputError(
                f"A box needs slice_min < slice_max, row_min < row_max, column_min < column_max; "
                f"got {tuple(edges.tolist())}."
            )

    @property
    def lower(self) -> NDArray[np.float64]:
        """Lower edges (slice, row, column)."""
        return np.array([self.slice_min, self.row_min, self.column_min], dtype=float)

    @property
    def upper(self) -> NDArray[np.float64]:
        """Upper edges (slice, row, column)."""
        return np.array([self.slice_max, self.row_max, self.column_max], dtype=float)

    @property
    def center_index(self) -> NDArray[np.float64]:
        """The middle as a voxel-centre index (slice, row, column)."""
        return (self.lower + self.upper) / 2 - 0.5

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """The voxels touched, for ``array[box.slices]``; not clipped above, never below 0."""
        low = np.maximum(np.floor(self.lower), 0).astype(int)
        high = np.maximum(np.ceil(self.upper), 0).astype(int)
        return (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))

    def clip(self, shape: tuple[int, ...]) -> Box:
        """Return the part inside an array of ``shape``; InputError if nothing is left."""
        low = np.clip(self.lower, 0, shape)
        high = np.clip(self.upper, 0, shape)
        return Box(*low.tolist(), *high.tolist())

    def shift(self, slices: float, rows: float, columns: float) -> Box:
        """Return the box moved by so many voxels."""
        by = np.array([slices, rows, columns], dtype=float)
        return Box(*(self.lower + by).tolist(), *(self.upper + by).tolist())


@dataclass(frozen=True)
class BoxMm:
    """An axis-aligned box in patient millimetres (frame LPS)."""

    x_min_mm: float
    y_min_mm: float
    z_min_mm: float
    x_max_mm: float
    y_max_mm: float
    z_max_mm: float


def make_affine(
    origin_mm: ArrayLike,
    slice_direction: ArrayLike,
    row_direction: ArrayLike,
    column_direction: ArrayLike,
    spacing_mm: ArrayLike,
) -> Affine:
    """Build an affine from the centre of voxel 0, unit vectors of increasing index, and spacings.

    ``row_direction`` is the way one walks when the *row index* grows (DICOM calls the second triple
    of ImageOrientationPatient the direction of the column). ``spacing_mm`` is (slice, row, column).
    """
    spacing = np.asarray(spacing_mm, dtype=float)
    affine = np.eye(4)
    directions = (slice_direction, row_direction, column_direction)
    for axis, direction in enumerate(directions):
        affine[:3, axis] = np.asarray(direction, dtype=float) * spacing[axis]
    affine[:3, 3] = np.asarray(origin_mm, dtype=float)
    return affine


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Return the voxel spacing (slice, row, column) in mm."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return (float(lengths[0]), float(lengths[1]), float(lengths[2]))


def directions_of(affine: Affine) -> NDArray[np.float64]:
    """Return a 3 x 3 matrix whose columns are the unit vectors of slice, row and column index."""
    return affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)


def index_to_patient(affine: Affine, points: ArrayLike) -> NDArray[np.float64]:
    """Take indices ``[..., 3]`` (slice, row, column) to patient mm ``[..., 3]`` (x, y, z)."""
    return np.asarray(points, dtype=float) @ affine[:3, :3].T + affine[:3, 3]


def patient_to_index(affine: Affine, points_mm: ArrayLike) -> NDArray[np.float64]:
    """Take patient mm ``[..., 3]`` to fractional indices ``[..., 3]``: the inverse of the above."""
    shifted = np.asarray(points_mm, dtype=float) - affine[:3, 3]
    solved = np.linalg.solve(affine[:3, :3], shifted.reshape(-1, 3).T)
    return np.asarray(solved.T, dtype=np.float64).reshape(shifted.shape)


def box_corners_mm(affine: Affine, box: Box) -> NDArray[np.float64]:
    """Return the eight corners of a voxel-edge box in patient mm, ``[8, 3]``."""
    sides = zip(box.lower - 0.5, box.upper - 0.5, strict=True)
    return index_to_patient(affine, list(product(*sides)))


def box_to_patient(affine: Affine, box: Box) -> BoxMm:
    """Return the axis-aligned patient box that holds all eight corners of ``box``.

    Two corners are not enough: on an oblique scan they lose most of the volume.
    """
    corners = box_corners_mm(affine, box)
    return BoxMm(*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())


def voxel_volume_mm3(affine: Affine) -> float:
    """Return the volume of one voxel in mm3."""
    return float(abs(np.linalg.det(affine[:3, :3])))


def crop_affine(affine: Affine, start: ArrayLike) -> Affine:
    """Return the affine of the sub-array that starts at integer index ``start``."""
    cropped = affine.copy()
    cropped[:3, 3] = index_to_patient(affine, start)
    return cropped


_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_REVERSE_AXES = np.eye(4)[[2, 1, 0, 3]]


def affine_from_nifti(nifti_affine: ArrayLike) -> Affine:
    """Turn a NIfTI affine, (column, row, slice) to RAS mm, into ours, (slice, row, column) to LPS mm.

    With the array transposed (``data.T``) this keeps every voxel where it is in the patient.
    """
    return _LPS_TO_RAS @ np.asarray(nifti_affine, dtype=float) @ _REVERSE_AXES


def affine_to_nifti(affine: Affine) -> NDArray[np.float64]:
    """Turn our affine into NIfTI's; the array is transposed on the same way (``array.T``)."""
    return _LPS_TO_RAS @ affine @ _REVERSE_AXES


def same_grid(
    first: Affine, second: Affine, shape: tuple[int, ...], tolerance_mm: float = 1e-2
) -> bool:
    """Tell whether two affines put every voxel of an array of ``shape`` within ``tolerance_mm``."""
    extent = Box(0, 0, 0, *(max(size, 1) for size in shape))
    distance = box_corners_mm(first, extent) - box_corners_mm(second, extent)
    return bool(np.abs(distance).max() <= tolerance_mm)
