"""Batches: every scan its folder, failures recorded, finished work kept, stops in between."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvision import batch
from medvision.batch import predict_references, predict_scans
from medvision.errors import InputError, Interrupted, ResourceError, UsageError
from medvision.findings.finding import Finding, ScanFindings, SliceBox
from medvision.geometry import Box, box_to_patient, make_affine
from medvision.outputs.case_folder import folder_name
from medvision.outputs.json_csv import read_findings
from medvision.scans.images import read_image, write_image
from medvision.scans.load import find_scans
from medvision.scans.volume import Volume

AFFINE = make_affine((-30, -40, 50), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2.5, 0.7, 0.9))


class FakePredictor:
    """Finds the voxels of 1000 and above, as one box; fails as told by case id."""

    def __init__(self, weights="aa", fail=None):
        self.about = {"run": "fake", "weights_sha256": weights, "medvision_version": "0.1.0"}
        self.fail = fail or {}
        self.seen = []

    def __call__(self, volume, case_id=None, on_progress=None):
        self.seen.append(case_id)
        if case_id in self.fail:
            raise self.fail[case_id]
        where = np.argwhere(volume.array >= 1000)
        findings = ()
        if len(where):
            low, high = where.min(axis=0), where.max(axis=0) + 1
            box = Box(*low.tolist(), *high.tolist())
            one = SliceBox(int(low[0]), *low[1:].tolist(), *high[1:].tolist(), 0.9)
            mask = volume.array[box.slices] >= 1000
            mm = box_to_patient(volume.affine, box)
            findings = (
                Finding(1, "nodule", 0.9, box, mm, (0, 0, 0), int(low[0]), 3.0, 4.0,
                        {"nodule": 0.9}, (one,), mask),
            )  # fmt: skip
        return ScanFindings(
            case_id, volume.shape, volume.affine, findings, ("nodule",), "CT", model=self.about
        )


def make_scans(folder, *names, sick=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        array = np.full((4, 20, 24), -800, np.int16)
        if name in sick:
            array[1:3, 5:8, 6:10] = 1000
        write_image(folder / f"{name}.nii.gz", Volume(array, AFFINE))
    return folder


@pytest.fixture
def scans(tmp_path):
    return make_scans(tmp_path / "in", "a", "b", "c", sick=("a", "c"))


def run(scans, out, predictor=None, **rest):
    return predict_references(predictor or FakePredictor(), list(find_scans(scans)), out, **rest)


def statuses(summary):
    return {one.case_id: one.status for one in summary.outcomes}


def test_every_scan_gets_its_folder(scans, tmp_path):
    out = tmp_path / "out"
    summary = run(scans, out)
    assert statuses(summary) == {"a": "done", "b": "done", "c": "done"}
    assert [one.findings for one in summary.outcomes] == [1, 0, 1]
    assert sorted(path.name for path in out.iterdir()) == ["a", "b", "c", "summary.json"]
    names = {"findings.json", "findings.csv", "findings.nii.gz", "source.json"}
    assert {path.name for path in (out / "a").iterdir()} == names | {"finding_01.png"}
    assert {path.name for path in (out / "b").iterdir()} == names
    labels = read_image(out / "a" / "findings.nii.gz")
    np.testing.assert_array_equal(labels.array == 1, read_image(scans / "a.nii.gz").array == 1000)
    assert read_findings(out / "b").findings == ()
    source = json.loads((out / "a" / "source.json").read_text())
    assert source["path"] == str(scans / "a.nii.gz")
    assert source["kind"] == "nifti"


def test_summary_file_tells_the_same(scans, tmp_path):
    summary = run(
        scans,
        tmp_path / "out",
        FakePredictor(fail={"b": InputError("Too few slices.", do="Take more.")}),
        skipped=[("x.txt", "1 left out: no scan.")],
    )
    made = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert made["intended_use"] == "For research use only. Not for diagnosis."
    assert made["complete"] is True
    assert made["counts"] == {"scans": 3, "done": 2, "kept": 0, "failed": 1}
    assert [case["status"] for case in made["cases"]] == ["done", "failed", "done"]
    assert made["cases"][1]["reason"] == "Too few slices. do: Take more."
    assert made["skipped"] == [{"path": "x.txt", "reason": "1 left out: no scan."}]
    assert [one.case_id for one in summary.with_status("failed")] == ["b"]


@pytest.mark.parametrize("error", [InputError("no"), ValueError("boom"), RuntimeError("CUDA")])
def test_a_failing_scan_is_recorded_and_leaves_nothing(scans, tmp_path, error, caplog):
    with caplog.at_level(logging.ERROR, logger="medvision"):
        summary = run(scans, tmp_path / "out", FakePredictor(fail={"b": error}))
    assert statuses(summary) == {"a": "done", "b": "failed", "c": "done"}
    assert str(error) in summary.outcomes[1].reason
    assert "Traceback" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "c", "summary.json"]


def test_an_unreadable_scan_is_recorded(scans, tmp_path):
    (scans / "b.nii.gz").write_bytes(b"no image")
    summary = run(scans, tmp_path / "out")
    assert statuses(summary)["b"] == "failed"
    assert "cannot be read" in summary.outcomes[1].reason


def test_finished_scans_are_kept_and_overwrite_redoes_them(scans, tmp_path):
    out = tmp_path / "out"
    run(scans, out)
    again = FakePredictor()
    summary = run(scans, out, again)
    assert statuses(summary) == {"a": "kept", "b": "kept", "c": "kept"}
    assert [one.findings for one in summary.outcomes] == [1, 0, 1]
    assert again.seen == []
    (out / "a" / "old.txt").write_text("of the user")
    assert set(statuses(run(scans, out, overwrite=True)).values()) == {"done"}
    assert not (out / "a" / "old.txt").exists()
    assert sorted(path.name for path in out.iterdir()) == ["a", "b", "c", "summary.json"]


def test_what_a_killed_process_left_of_a_scan_goes_when_the_scan_is_written(scans, tmp_path):
    out = tmp_path / "out"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [f".partial-{dead.pid}-a", f".partial-{dead.pid}-a-old", f".partial-{10**30}-c"]
    others = [f".partial-{os.getppid()}-a", f".partial-{dead.pid}-d", ".partial-x-a", "a-old"]
    for name in left + others:
        (out / name / "inner").mkdir(parents=True)
    assert set(statuses(run(scans, out)).values()) == {"done"}
    there = {path.name for path in out.iterdir()}
    assert there == {*others, "a", "b", "c", "summary.json"}


def test_other_weights_settings_or_scans_are_predicted_again(scans, tmp_path):
    out = tmp_path / "out"
    run(scans, out)
    assert set(statuses(run(scans, out, FakePredictor("bb"))).values()) == {"done"}
    strict = {"score_thresh": 0.5}
    assert set(statuses(run(scans, out, FakePredictor("bb"), settings=strict)).values()) == {"done"}
    make_scans(scans, "b", sick=("b",))
    (out / "c" / "findings.json").write_text("{")
    summary = run(scans, out, FakePredictor("bb"), settings=strict)
    assert statuses(summary) == {"a": "kept", "b": "done", "c": "done"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "Memory ran out"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "Memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (ResourceError("Memory ran out."), "Memory ran out"),
    ],
)
def test_exhaustion_stops_the_batch_and_keeps_what_is_done(scans, tmp_path, error, message):
    predictor = FakePredictor(fail={"b": error})
    with pytest.raises(ResourceError, match=message):
        run(scans, tmp_path / "out", predictor)
    assert predictor.seen == ["a", "b"]
    assert (tmp_path / "out" / "a" / "findings.json").is_file()
    made = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert made["complete"] is False
    assert len(made["cases"]) == 1


def test_a_scan_that_is_refused_with_a_decoders_words_on_memory_stops_nothing(scans, tmp_path):
    refused = InputError(
        "The pixels cannot be decoded.", why="std::bad_alloc", where="bad_alloc.dcm"
    )
    summary = run(scans, tmp_path / "out", FakePredictor(fail={"b": refused}))
    assert statuses(summary) == {"a": "done", "b": "failed", "c": "done"}


def test_a_signal_stops_after_the_scan_at_work_and_the_same_call_goes_on(scans, tmp_path):
    predictor = FakePredictor()
    with pytest.raises(Interrupted) as caught:
        run(scans, tmp_path / "out", predictor, should_stop=lambda: 15 if predictor.seen else None)
    assert caught.value.exit_code == 143
    assert predictor.seen == ["a"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["complete"] is False
    assert statuses(run(scans, tmp_path / "out")) == {"a": "kept", "b": "done", "c": "done"}


def test_progress_counts_the_scans(scans, tmp_path):
    reports = []
    run(scans, tmp_path / "out", on_progress=reports.append)
    counted = [(one.done, one.total, one.note) for one in reports if one.stage == "scans"]
    assert counted == [(0, 3, "a"), (1, 3, "b"), (2, 3, "c"), (3, 3, "")]


@pytest.fixture
def fake_run(monkeypatch):
    made = []

    def load(run, engine, device, score_thresh):
        made.append((run, engine, device, score_thresh))
        return FakePredictor()

    monkeypatch.setattr(batch, "load_predictor", load)
    config = SimpleNamespace(
        stack=SimpleNamespace(window_hu=(-1000.0, 400.0)), model_dump_json=lambda: "{}"
    )
    monkeypatch.setattr(batch, "check_run", lambda run, engine: config)
    return made


def test_predict_scans_searches_then_loads_then_predicts(tmp_path, fake_run):
    make_scans(tmp_path / "data" / "scans", "a", "b", sick=("a",))
    make_scans(tmp_path / "data" / "labels", "a")
    summary = predict_scans(
        Path("run"), tmp_path / "data", tmp_path / "out", device="cpu", score_thresh=0.3
    )
    assert statuses(summary) == {"a": "done", "b": "done"}
    assert fake_run == [(Path("run"), "torch", "cpu", 0.3)]
    source = json.loads((tmp_path / "out" / "a" / "source.json").read_text())
    assert source["settings"]["score_thresh"] == 0.3
    config = batch.check_run(Path("run"), "torch")
    config.model_dump_json = lambda: '{"nms_thresh": 0.5}'
    again = predict_scans(
        Path("run"), tmp_path / "data", tmp_path / "out", device="cpu", score_thresh=0.3
    )
    assert statuses(again) == {"a": "done", "b": "done"}


def test_nothing_is_loaded_if_there_is_no_scan(tmp_path, fake_run):
    with pytest.raises(InputError, match="at least one scan"):
        predict_scans(Path("run"), tmp_path, tmp_path / "out")
    with pytest.raises(UsageError):
        predict_scans(Path("run"), tmp_path / "nowhere", tmp_path / "out")
    assert fake_run == []
    assert not (tmp_path / "out").exists()


def test_a_missing_run_is_told_before_the_search(tmp_path):
    make_scans(tmp_path / "data", "a")
    with pytest.raises(UsageError, match=r"detector\.json"):
        predict_scans(tmp_path / "no run", tmp_path / "data", tmp_path / "out")


def test_a_series_is_chosen_by_name_and_an_unknown_one_refused(tmp_path, fake_run):
    make_scans(tmp_path / "data", "a", "b")
    summary = predict_scans(Path("run"), tmp_path / "data", tmp_path / "out", series="b")
    assert statuses(summary) == {"b": "done"}
    with pytest.raises(InputError, match="description 'z'"):
        predict_scans(Path("run"), tmp_path / "data", tmp_path / "out", series="z")


@given(st.text(max_size=300))
def test_folder_names_are_safe_and_stay_the_same(case_id):
    name = folder_name(case_id)
    assert 0 < len(name.encode()) <= 128
    assert not name.startswith(".")
    assert not set(name) & set("/\\:\0\n")
    assert name not in {"summary.json", "log.txt"}
    assert folder_name(case_id) == name


@given(st.sets(st.text(max_size=140), min_size=2, max_size=5))
def test_folder_names_of_different_cases_differ(case_ids):
    assert len({folder_name(case_id) for case_id in case_ids}) == len(case_ids)


@pytest.mark.parametrize("name", ["1.2.840.113619.2.55", "LIDC-IDRI-0001", "case 7 (b)", "Größe"])
def test_plain_names_stay(name):
    assert folder_name(name) == name


def test_hostile_names_stay_inside_the_output_folder(tmp_path):
    for name in ("../../etc", "/abs", "..", "a/b", "summary.json", "x" * 400):
        made = folder_name(name)
        assert (tmp_path / made).resolve().parent == tmp_path.resolve()
