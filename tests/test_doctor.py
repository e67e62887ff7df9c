"""The doctor: what it finds on this machine, and that it notices what is wrong."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from medvision import doctor, doctor_decoding
from medvision.cli.main import main
from medvision.diagnosis import Check, Diagnosis, Section
from medvision.doctor_samples import ENCODED_SAMPLES

READ_BY_MEDVISION = {
    *(f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".1.99", ".2", ".5")),
    *(f"1.2.840.10008.1.2.4.{end}" for end in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)),
}


def test_every_transfer_syntax_is_decoded() -> None:
    checks = list(doctor_decoding.check_transfer_syntaxes())
    assert {check.name.rpartition("(")[2].rstrip(")") for check in checks} == READ_BY_MEDVISION
    assert not [check for check in checks if check.status != "ok"]


def test_lossless_samples_are_exact() -> None:
    details = {check.name: check.detail for check in doctor_decoding.check_transfer_syntaxes()}
    for name, detail in details.items():
        lossy = name.endswith((".50)", ".51)", ".81)", ".91)", ".203)"))
        assert detail.startswith("lossy") if lossy else detail == "exact"


def test_the_samples_are_right_by_an_independent_reader(tmp_path: Path) -> None:
    """Read them with GDCM, which medvision itself asks only for some kinds of JPEG."""
    import SimpleITK

    for name, path, image, tolerance in doctor_decoding.write_samples(tmp_path):
        pixels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0]
        assert np.abs(pixels.astype(int) - image).max() <= tolerance, name


def test_wrong_pixels_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted = {name: image + 50 for name, image in doctor_decoding.known_images().items()}
    monkeypatch.setattr(doctor_decoding, "known_images", lambda: shifted)
    checks = list(doctor_decoding.check_transfer_syntaxes())
    compressed = [check for check in checks if ".4." in check.name]
    assert {check.status for check in compressed} == {"failed"}
    assert all("wrong pixels" in check.detail and check.remedy for check in compressed)


def test_a_broken_frame_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tuple(
        dataclasses.replace(sample, frame_base64=base64.b64encode(b"\xff\xd8 no").decode())
        for sample in ENCODED_SAMPLES
        if sample.transfer_syntax_uid.endswith((".80", ".90"))
    )
    monkeypatch.setattr(doctor_decoding, "ENCODED_SAMPLES", broken)
    failed = [c for c in doctor_decoding.check_transfer_syntaxes() if c.status == "failed"]
    assert len(failed) == 2


def test_known_images_do_not_look_the_same_flipped_or_transposed() -> None:
    for image in doctor_decoding.known_images().values():
        assert image.shape == (12, 16)
        assert not np.array_equal(image, image[::-1])
        assert not np.array_equal(image, image[:, ::-1])


def test_packages_come_with_versions() -> None:
    checks = {check.name: check for check in doctor.check_packages()}
    assert checks["pydicom"].status == "ok"
    assert checks["pydicom"].detail[0].isdigit()
    assert "pytest" not in checks, "extras are not needed"


def test_optional_packages_are_named_with_their_use(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor._version_of
    there = {"timm": "1.2.3", "onnxruntime": None}
    monkeypatch.setattr(doctor, "_version_of", lambda name: there.get(name, known(name)))
    checks = {check.name: check for check in doctor.check_packages()}
    assert checks["timm"].detail == "1.2.3, optional: backbones named timm/NAME"
    assert checks["onnxruntime"].status == "note"
    assert checks["onnxruntime"].detail.startswith("not installed, optional: medvision export")
    assert {"onnx", "onnxscript", "python-gdcm"} <= checks.keys()


def test_a_missing_package_fails_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor._version_of
    monkeypatch.setattr(doctor, "_version_of", lambda n: None if n == "nibabel" else known(n))
    failed = [check for check in doctor.check_packages() if check.status == "failed"]
    assert [check.name for check in failed] == ["nibabel"]
    assert "pip install" in (failed[0].remedy or "")


def test_processor_features_are_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Big CPU\nflags\t\t: fpu avx2 avx512f amx_tile amx_bf16\n"
        "\nprocessor\t: 1\nmodel name\t: Big CPU\n"
    )
    model, flags = doctor.read_cpuinfo(cpuinfo)
    assert model == "Big CPU"
    assert flags == {"fpu", "avx2", "avx512f", "amx_tile", "amx_bf16"}
    assert doctor.read_cpuinfo(tmp_path / "none") == ("", set())


def test_a_container_limits_the_cores(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    assert doctor._usable_cores(quota) == 0.5
    quota.write_text("max 100000\n")
    assert doctor._usable_cores(quota) >= 1


def test_memory_is_read_from_meminfo(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:       4 kB\n")
    available = doctor._available_memory(meminfo)
    assert available is not None
    assert available <= 4096
    assert doctor._available_memory(tmp_path / "none") is None


def test_a_folder_that_is_not_there_fails(tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.check_space(tmp_path / "none")}
    assert checks["Output folder"].status == "failed"
    assert checks["Temporary folder"].status in ("ok", "note")
    assert not list(tmp_path.iterdir())


def test_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.check_space(tmp_path)}
    assert "writable" in checks["Output folder"].detail
    assert not list(tmp_path.iterdir())


def test_json_of_a_quick_examination(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", str(tmp_path), "--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    titles = [section["title"] for section in document["sections"]]
    assert titles == ["Versions", "Processor", "Memory and disk"]


def test_text_and_exit_code_of_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Check("RLE", "failed", "wrong pixels", "Install it again.")
    found = Diagnosis((Section("Decoding", (bad, Check("JPEG", "ok", "exact"))),))
    monkeypatch.setattr("medvision.doctor.diagnose", lambda *a, **k: found)
    assert main(["doctor"]) == 3
    text = capsys.readouterr().out
    assert "FAILED" in text
    assert "Install it again." in text
    assert "Failed: RLE" in text


@pytest.mark.parametrize(
    ("cuda", "driver", "names", "status"),
    [
        (True, "550.1", ["cuda:0", "cuda:1", "Driver"], "ok"),
        (False, "550.1", ["CUDA"], "note"),
        (False, None, ["CUDA"], "note"),
    ],
)
def test_the_graphics_processor_is_named_with_its_driver(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, driver: str | None, names: list[str], status: str
) -> None:
    import torch

    properties = SimpleNamespace(name="H100", total_memory=80 * 2**30)
    monkeypatch.setattr(doctor, "_nvidia_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    checks = list(doctor.check_gpu())
    assert [check.name for check in checks] == names
    assert {check.status for check in checks} == {status}
    if cuda:
        assert checks[0].detail.startswith("H100, 80")
        assert checks[-1].detail == "550.1"
    elif driver:
        assert "driver 550.1 found, but torch" in checks[0].detail
        assert checks[0].remedy is not None
    else:
        assert "computes on the processor" in checks[0].detail
