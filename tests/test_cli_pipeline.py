"""The commands one after another, as typed: from scans on disk to a page, and what they exit with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from medvision.cli.main import main
from medvision.labels.masks import write_labels
from medvision.sample_data.phantoms import make_phantom, write_phantom_dataset, write_phantom_series

TINY = {
    "steps": 4,
    "batch_size": 2,
    "validations": 1,
    "precision": "float32",
    "device": "cpu",
    "validation_fraction": 0.3,
    "stack.n_slices": 3,
    "sampling.crop_size": 32,
    "model.width": 8,
    "model.pyramid_channels": 8,
    "model.head_depth": 1,
    # An untrained network is sure of nothing: without this it would find nothing at all.
    "predict.box_score_thresh": 0,
}

TINY_WORDS = [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that medvision train made in seconds: all it finds is noise, at 1 percent or so."""
    folder = tmp_path_factory.mktemp("cli")
    write_phantom_dataset(folder / "data", 5, healthy_every=2)
    assert main(["train", str(folder / "data"), "-o", str(folder / "run"), *TINY_WORDS]) == 0
    return folder / "run"


def findings_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("*/findings.json"))]


def evaluation_of(page: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(page.with_suffix(".json").read_text())["evaluation"]
    return found


def test_a_dicom_series_goes_to_findings_and_a_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phantom = make_phantom()
    write_phantom_series(tmp_path / "series", phantom)
    out, truth = tmp_path / "out", tmp_path / "truth"
    words = ["predict", str(run), str(tmp_path / "series"), "-o", str(out), "--score-thresh", "0"]
    assert main(words) == 0
    (found,) = findings_of(out)
    assert len(found["findings"]) > 0  # type: ignore[arg-type]
    folder = next(out.glob("*/findings.json")).parent
    assert (folder / "findings.csv").is_file()
    assert (folder / "findings.nii.gz").is_file()
    assert len(list(folder.glob("finding_*.png"))) == min(50, len(found["findings"]))  # type: ignore[arg-type]
    truth.mkdir()
    write_labels(truth, folder.name, phantom.volume, phantom.annotations)
    page = out / "report.html"
    capsys.readouterr()
    assert main(["report", str(out), "--truth", str(truth), "-o", str(page)]) == 0
    assert "1 scans compared" in capsys.readouterr().out
    assert "<html" in page.read_text()[:300]
    assert evaluation_of(page)["scans"] == 1


def test_a_healthy_scan_gives_an_empty_list_and_0(run: Path, tmp_path: Path) -> None:
    healthy = tmp_path / "data"
    write_phantom_dataset(healthy, 1, healthy_every=1)
    out = tmp_path / "out"
    words = ["predict", str(run), str(healthy / "scans"), "-o", str(out), "--score-thresh", "0.9"]
    assert main(words) == 0
    (found,) = findings_of(out)
    assert found["findings"] == []
    page = tmp_path / "report.html"
    assert main(["report", str(out), "--truth", str(healthy), "-o", str(page)]) == 0
    assert evaluation_of(page)["healthy_scans"] == 1


def test_one_bad_scan_is_named_and_the_rest_is_done(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    names = write_phantom_dataset(data, 2)
    (data / "scans" / f"{names[0]}.nii.gz").write_bytes(b"no scan")
    out = tmp_path / "out"
    assert main(["predict", str(run), str(data / "scans"), "-o", str(out)]) == 4
    said = capsys.readouterr()
    assert f"Failed: {names[0]}" in said.err
    assert "1 of 2 scans done" in said.out
    assert [path.parent.name for path in out.glob("*/findings.json")] == [names[1]]
    # A label volume that cannot be read: the other scan is compared all the same.
    shutil.copy(data / "scans" / f"{names[1]}.nii.gz", data / "scans" / f"{names[0]}.nii.gz")
    assert main(["predict", str(run), str(data / "scans"), "-o", str(out)]) == 0
    (data / "labels" / f"{names[0]}.nii.gz").write_bytes(b"no labels")
    page = str(tmp_path / "report.html")
    assert main(["report", str(out), "--truth", str(data), "-o", page]) == 4
    assert names[0] in capsys.readouterr().err


def test_a_refused_scan_is_named_by_train_and_ends_with_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_phantom_dataset(tmp_path / "data", 5)
    scans = sorted((tmp_path / "data" / "scans").iterdir())
    scans[0].write_bytes(scans[0].read_bytes()[:2000])
    broken, unread = (path.name.removesuffix(".nii.gz") for path in scans[:2])
    words = ["train", str(tmp_path / "data"), "-o", str(tmp_path / "run"), *TINY_WORDS]
    assert main([*words, "--dry-run"]) == 4
    assert f"Left out: {broken}: " in capsys.readouterr().err
    assert main(words) == 4
    assert f"Left out: {broken}: " in capsys.readouterr().err
    # What nobody read is no failure.
    scans[0].unlink()
    for label in (tmp_path / "data" / "labels").glob(f"{broken}*"):
        label.unlink()
    for label in (tmp_path / "data" / "labels").glob(f"{unread}*"):
        label.unlink()
    words[3] = str(tmp_path / "other")
    assert main(words) == 0
    assert f"Left out: {unread}: no label file" in capsys.readouterr().err


def test_a_run_that_is_over_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(run.parent / "data")
    assert main(["train", data, "-o", str(run), "--resume"]) == 0
    assert "nothing was left to train" in capsys.readouterr().out
    assert main(["train", data, "-o", str(run), "--resume", "--model", "unet"]) == 2
    assert "started with --model retinanet, not unet" in capsys.readouterr().err
    assert main(["train", data, "-o", str(run), "--resume", "--set", "batch_size=4"]) == 2
    assert "batch_size was 2, now 4" in capsys.readouterr().err


def test_findings_of_another_model_are_not_replaced_in_silence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_phantom_dataset(tmp_path / "data", 1)
    words = ["predict", str(run), str(tmp_path / "data" / "scans"), "-o", str(tmp_path / "out")]
    assert main(words) == 0
    assert "replaced" not in capsys.readouterr().out
    assert main([*words, "--score-thresh", "0.9"]) == 0
    assert "replaced" in capsys.readouterr().out
    assert main([*words, "--score-thresh", "0.9"]) == 0
    assert "kept" in capsys.readouterr().out


def test_the_report_keeps_its_log_apart(run: Path, tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path / "data", 1)
    (tmp_path / "log.txt").write_text("mine")
    out = tmp_path / "out"
    assert main(["predict", str(run), str(tmp_path / "data" / "scans"), "-o", str(out)]) == 0
    words = ["report", str(out), "--truth", str(tmp_path / "data"), "-o", str(tmp_path / "r.html")]
    assert main(words) == 0
    assert (tmp_path / "log.txt").read_text() == "mine"
    assert "medvision report" in (tmp_path / "r.log").read_text()


def test_nothing_that_works_is_refused_with_3(run: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nii.gz").write_bytes(b"no scan")
    assert main(["predict", str(run), str(tmp_path / "scans"), "-o", str(tmp_path / "out")]) == 3
