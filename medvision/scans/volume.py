"""Volume: the voxels of one scan with their place in the patient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvision import geometry
from medvision.errors import InputError
from medvision.geometry import Affine, Box, BoxMm


@dataclass(frozen=True)
class ScanSource:
    """Where a volume came from. Only these identifiers are carried on; no name, birth date or the like.

    ``patient_id`` groups scans for the split and never leaves medvision's memory in clear.
    """

    path: Path | None = None
    modality: str = ""
    patient_id: str = ""
    study_instance_uid: str = ""
    series_instance_uid: str = ""
    frame_of_reference_uid: str = ""
    sop_instance_uids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Volume:
    """Voxels ``array[slice, row, column]`` with the ``affine`` that places them in LPS mm.

    CT values are in HU. The array has three dimensions, none of size zero, and a real number type.
    ``notes`` says in sentences what the reader repaired or assumed. Raises InputError if a rule is broken.
    """

    array: NDArray
    affine: Affine
    source: ScanSource = field(default_factory=ScanSource)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.array.ndim != 3 or 0 in self.array.shape:
            raise InputError(
                f"A volume needs three dimensions [slice, row, column], none empty; got {self.array.shape}."
            )
        if self.affine.shape != (4, 4) or not np.isfinite(self.affine).all():
            raise InputError(f"A volume needs a finite 4 x 4 affine; got {self.affine.tolist()}.")
        if (
            min(geometry.spacing_of(self.affine)) <= 0
            or geometry.voxel_volume_mm3(self.affine) < 1e-9
        ):
            raise InputError(
                f"Voxel spacing must be above 0 mm and the axes independent; "
                f"got {geometry.spacing_of(self.affine)} mm (slice, row, column)."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size (slices, rows, columns)."""
        slices, rows, columns = self.array.shape
        return (slices, rows, columns)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing (slice, row, column) in mm."""
        return geometry.spacing_of(self.affine)

    def index_to_patient(self, points: ArrayLike) -> NDArray[np.float64]:
        """Take voxel-centre indices ``[..., 3]`` (slice, row, column) to LPS mm ``[..., 3]``."""
        return geometry.index_to_patient(self.affine, points)

    def patient_to_index(self, points_mm: ArrayLike) -> NDArray[np.float64]:
        """Take LPS mm ``[..., 3]`` to fractional indices ``[..., 3]`` (slice, row, column)."""
        return geometry.patient_to_index(self.affine, points_mm)

    def box_to_patient(self, box: Box) -> BoxMm:
        """Return the LPS box in mm that holds all eight corners of a voxel-edge box."""
        return geometry.box_to_patient(self.affine, box)

    def crop(self, box: Box) -> Volume:
        """Return the voxels that ``box`` touches as a volume of their own, at the same place in the patient."""
        window = box.clip(self.shape).slices
        start = [axis.start for axis in window]
        uids = self.source.sop_instance_uids[window[0]]
        return Volume(
            self.array[window],
            geometry.crop_affine(self.affine, start),
            replace(self.source, sop_instance_uids=uids),
            self.notes,
        )
