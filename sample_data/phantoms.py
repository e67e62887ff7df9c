"""Small computed chest phantoms with known lesions, for tests, examples and first trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvision.errors import UsageError
from medvision.geometry import Affine, Box, make_affine
from medvision.labels.annotation import Annotation
from medvision.scans.volume import ScanSource, Volume

AIR_HU, LUNG_HU, TISSUE_HU, VESSEL_HU = -1000.0, -850.0, 40.0, 30.0

LESION_CLASSES = ("ground_glass", "part_solid", "solid")
_LESION_HU = {"ground_glass": -550.0, "part_solid": -550.0, "solid": 40.0}
_CORE_HU = 20.0
_CORE_FRACTION = 0.55
"""Radius of a part-solid lesion's solid core, as a fraction of the lesion's."""

_TRIES_PER_LESION = 2000
_GAP_MM = 2.0


def _oblique(degrees: float) -> NDArray[np.float64]:
    """Return axial directions turned by so many degrees about x, then about z."""
    angle = np.radians(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    about_z = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return about_z @ about_x @ _AXIAL


_AXIAL = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=float)
ORIENTATIONS: dict[str, NDArray[np.float64]] = {
    "axial": _AXIAL,
    "oblique": _oblique(30),
    "flipped": _AXIAL * [-1, 1, -1],
    "mirrored": _AXIAL * [1, 1, -1],
    "sagittal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=float),
    "coronal": np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]], dtype=float),
}
"""Unit vectors in LPS, in columns, of increasing slice, row and column index."""


@dataclass(frozen=True)
class Phantom:
    """A computed CT volume (int16, HU) and every lesion that was put in it."""

    volume: Volume
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True)
class _Lesion:
    class_name: str
    center_mm: NDArray[np.float64]
    radii_mm: NDArray[np.float64]


def make_phantom(
    shape: tuple[int, int, int] = (24, 64, 48),
    spacing_mm: tuple[float, float, float] = (2.5, 0.8, 0.7),
    orientation: str = "axial",
    n_lesions: int = 3,
    seed: int = 0,
    *,
    diameter_mm: tuple[float, float] = (4.0, 7.0),
    noise_hu: float = 20.0,
) -> Phantom:
    """Compute a chest: a body of soft tissue, two lungs, vessels, and lesions in the lungs.

    ``shape`` and ``spacing_mm`` are (slice, row, column); the body fills the array whatever its
    size, and ``orientation`` (a key of ``ORIENTATIONS``) turns the array in the patient. Lesions
    are ellipsoids of the classes ``LESION_CLASSES`` in turn, apart from each other; ``n_lesions=0``
    is a healthy scan. The same arguments give the same phantom. Raises UsageError for an unknown
    orientation, or if the lesions find no room.
    """
    if orientation not in ORIENTATIONS:
        raise UsageError(
            f"orientation must be one of {', '.join(ORIENTATIONS)}; got {orientation}."
        )
    generator = np.random.default_rng(seed)
    grid = _grid_mm(shape, spacing_mm)
    hu, lungs = _healthy_chest(grid, shape, spacing_mm, generator)
    lesions = _place_lesions(grid, lungs, n_lesions, diameter_mm, generator)
    annotations = tuple(_paint(hu, grid, one, label) for label, one in enumerate(lesions, 1))
    hu += generator.normal(0, noise_hu, shape)
    volume = Volume(
        np.rint(hu).clip(-1024, 3071).astype(np.int16),
        _affine(shape, spacing_mm, orientation),
        ScanSource(modality="CT", patient_id=f"phantom-{seed}"),
    )
    return Phantom(volume, annotations)


def write_phantom_dataset(
    folder: str | Path,
    n: int = 4,
    *,
    seed: int = 0,
    healthy_every: int = 4,
    orientations: Sequence[str] = ("axial", "flipped"),
    shape: tuple[int, int, int] = (24, 64, 48),
    spacing_mm: tuple[float, float, float] = (2.5, 0.8, 0.7),
    n_lesions: int = 3,
    suffix: str = ".nii.gz",
) -> list[str]:
    """Write ``n`` labelled phantoms as a dataset (scans/, labels/, cases.csv); return the case ids.

    Every ``healthy_every``-th case has no lesion (0: none is healthy); ``orientations`` come in
    turn.
    """
    from medvision.files import atomic_write_text
    from medvision.labels.masks import write_labels
    from medvision.scans.images import write_image

    folder = Path(folder)
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    case_ids = [f"phantom_{index:03d}" for index in range(n)]
    for index, case_id in enumerate(case_ids):
        healthy = healthy_every > 0 and index % healthy_every == healthy_every - 1
        orientation = orientations[index % len(orientations)]
        lesions = 0 if healthy else n_lesions
        phantom = make_phantom(shape, spacing_mm, orientation, lesions, seed + index)
        write_image(folder / "scans" / f"{case_id}{suffix}", phantom.volume)
        write_labels(folder / "labels", case_id, phantom.volume, phantom.annotations)
    rows = [f"{case_id},patient_{index:03d}" for index, case_id in enumerate(case_ids)]
    atomic_write_text(folder / "cases.csv", "\n".join(["case_id,patient_id", *rows, ""]))
    return case_ids


def write_phantom_series(
    folder: str | Path, phantom: Phantom, *, patient_id: str = "phantom"
) -> list[Path]:
    """Write a phantom as a DICOM CT series; return the files in slice order."""
    from medvision.outputs.dicom_ct import write_ct_series

    return write_ct_series(
        phantom.volume,
        folder,
        patient_id=patient_id,
        series_description="Phantom",
        attributes={
            "Manufacturer": "medvision",
            "BodyPartExamined": "CHEST",
            "PatientPosition": "HFS",
            "DerivationDescription": "Computed chest phantom",
        },
    )


def _healthy_chest(
    grid: list[NDArray],
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    generator: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return HU without noise, and where the lungs are."""
    hu = np.full(shape, AIR_HU)
    hu[_inside(grid, _middle(shape, spacing_mm), _body_radii(shape, spacing_mm))] = TISSUE_HU
    lungs = _lungs(grid, shape, spacing_mm)
    hu[lungs] = LUNG_HU
    hu[_vessels(grid, shape, spacing_mm, generator) & lungs] = VESSEL_HU
    return hu, lungs


def _affine(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], orientation: str
) -> Affine:
    """Place the middle of the array at a point that is not the origin, so that sign errors show."""
    directions = ORIENTATIONS[orientation]
    half = directions @ _middle(shape, spacing_mm)
    slices, rows, columns = directions.T
    return make_affine(np.array([11.5, -23.25, 142.0]) - half, slices, rows, columns, spacing_mm)


def _grid_mm(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> list[NDArray]:
    """Return the mm along slice, row and column axis of every voxel centre, to be broadcast."""
    axes = [np.arange(size) * step for size, step in zip(shape, spacing_mm, strict=True)]
    return list(np.meshgrid(*axes, indexing="ij", sparse=True))


def _middle(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> NDArray[np.float64]:
    return (np.array(shape) - 1) / 2 * np.array(spacing_mm)


def _body_radii(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """Return the body's radii: an ellipse in the plane, without end along the slices."""
    size = np.array(shape) * np.array(spacing_mm)
    return np.array([np.inf, 0.48 * size[1], 0.48 * size[2]])


def _inside(grid: list[NDArray], center: NDArray, radii: NDArray) -> NDArray[np.bool_]:
    parts = [((axis - c) / r) ** 2 for axis, c, r in zip(grid, center, radii, strict=True)]
    return np.asarray(parts[0] + parts[1] + parts[2] <= 1)


def _lungs(
    grid: list[NDArray], shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> NDArray[np.bool_]:
    size, middle = np.array(shape) * np.array(spacing_mm), _middle(shape, spacing_mm)
    radii = np.array([max(0.7 * size[0], spacing_mm[0]), 0.36 * size[1], 0.19 * size[2]])
    aside = np.array([0, 0, 0.22 * size[2]])
    return _inside(grid, middle - aside, radii) | _inside(grid, middle + aside, radii)


def _vessels(
    grid: list[NDArray],
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    generator: np.random.Generator,
) -> NDArray[np.bool_]:
    """Return slanted tubes along the slices: round in one slice like a lesion, long across them."""
    slices, rows, columns = grid
    size = np.array(shape) * np.array(spacing_mm)
    vessels = np.zeros(shape, bool)
    for side in (0.28, 0.72):
        for _ in range(3):
            row, column = (
                size[1] * generator.uniform(0.3, 0.7),
                size[2] * (side + generator.uniform(-0.1, 0.1)),
            )
            slope_row, slope_column = generator.uniform(-0.15, 0.15, 2)
            radius = generator.uniform(0.8, 1.4)
            along = slices - size[0] / 2
            distance = np.hypot(
                rows - row - slope_row * along, columns - column - slope_column * along
            )
            vessels |= distance <= radius
    return vessels


def _place_lesions(
    grid: list[NDArray],
    lungs: NDArray[np.bool_],
    n_lesions: int,
    diameter_mm: tuple[float, float],
    generator: np.random.Generator,
) -> list[_Lesion]:
    placed: list[_Lesion] = []
    candidates = np.argwhere(lungs)
    first_class = int(generator.integers(len(LESION_CLASSES)))
    for _ in range(_TRIES_PER_LESION * n_lesions if len(candidates) else 0):
        if len(placed) == n_lesions:
            break
        index = candidates[generator.integers(len(candidates))]
        center = np.array([axis.ravel()[i] for axis, i in zip(grid, index, strict=True)])
        radii = generator.uniform(*diameter_mm) / 2 * generator.uniform(0.85, 1.0, 3)
        name = LESION_CLASSES[(first_class + len(placed)) % len(LESION_CLASSES)]
        lesion = _Lesion(name, center, radii)
        if _has_room(grid, lungs, lesion, placed):
            placed.append(lesion)
    if len(placed) < n_lesions:
        raise UsageError(
            f"{n_lesions} lesions of {diameter_mm[0]:g} to {diameter_mm[1]:g} mm must fit the "
            f"lungs; {len(placed)} did.",
            do="make the array larger, or the lesions fewer or smaller.",
        )
    return placed


def _has_room(
    grid: list[NDArray], lungs: NDArray[np.bool_], lesion: _Lesion, placed: Sequence[_Lesion]
) -> bool:
    reach = lesion.radii_mm.max() + _GAP_MM
    if any(
        np.linalg.norm(lesion.center_mm - other.center_mm) < reach + other.radii_mm.max()
        for other in placed
    ):
        return False
    return bool(lungs[_inside(grid, lesion.center_mm, lesion.radii_mm)].all())


def _paint(hu: NDArray, grid: list[NDArray], lesion: _Lesion, label: int) -> Annotation:
    """Paint the lesion into ``hu`` and return its annotation."""
    whole = _inside(grid, lesion.center_mm, lesion.radii_mm)
    hu[whole] = _LESION_HU[lesion.class_name]
    if lesion.class_name == "part_solid":
        hu[_inside(grid, lesion.center_mm, lesion.radii_mm * _CORE_FRACTION)] = _CORE_HU
    inside = np.argwhere(whole)
    box = Box(*inside.min(axis=0).tolist(), *(inside.max(axis=0) + 1).tolist())
    return Annotation(label, lesion.class_name, box, whole[box.slices])
