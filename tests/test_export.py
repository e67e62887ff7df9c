"""Exported graphs: the same outputs at any size, the same findings, and refused if they are not."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_support import needs_onnx, small_detector
from torch import Tensor, nn

from medvision.cli import export as export_command
from medvision.cli.main import main
from medvision.detector import (
    load_detector,
    load_detector_config,
    save_detector_config,
    save_weights,
    with_score_thresh,
)
from medvision.device import choose_device
from medvision.errors import InputError, UsageError, ran_out_of_memory
from medvision.export import check, files, graph
from medvision.export.check import TOLERANCE, check_volumes, compare, largest_difference
from medvision.export.engine import OnnxPredictor, OnnxSession
from medvision.export.files import find_exported, load_exported, require_packages, settings_path
from medvision.export.graph import Exported, _write_torchscript, export_run
from medvision.export.outputs import GraphOutputs, graph_module
from medvision.export.two_stage import FixedLengths
from medvision.models.config import RetinaNetConfig
from medvision.models.family import build_model, detect
from medvision.models.family_config import MODEL_CONFIGS
from medvision.models.retinanet import build_retinanet
from medvision.predict import Predictor, find_lesions
from medvision.sample_data.phantoms import make_phantom
from medvision.scans.volume import Volume

SIZES = (((4.0, 4.0),), ((9.0, 9.0),), ((20.0, 18.0),))
MODEL = RetinaNetConfig(
    blocks=(1, 1, 1, 1),
    width=8,
    pyramid_channels=8,
    head_depth=1,
    anchors_per_level=1,
    anchor_sizes=SIZES,
)
CONFIG = small_detector(MODEL)
SHAPES = [(2, 3, 96, 128), (1, 3, 16, 16), (5, 3, 64, 208)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    network = build_retinanet(MODEL, 3, 2)
    spread_out(network)
    save_detector_config(folder, CONFIG)
    save_weights(folder / "best.safetensors", network.state_dict(), {})
    return folder


def spread_out(network: nn.Module) -> None:
    """Give a fresh network the statistics and the varied answers that a trained one has."""
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.0)
        if any(part in name for part in ("head", "output")) and hasattr(module, "weight"):
            nn.init.normal_(module.weight, std=2 / module.weight[0].numel() ** 0.5)
            nn.init.normal_(module.bias) if module.bias is not None else None


@pytest.fixture(scope="module")
def exported(run: Path) -> Exported:
    """Export once: torch takes ten seconds for it."""
    return export_run(run, format="onnx")


def outputs_of(run: Path, images: Tensor) -> dict[str, Tensor]:
    network, _, _ = load_detector(run)
    with torch.inference_mode():
        return plain_outputs(network, network(images))


def plain_outputs(network: nn.Module, raw: object) -> dict[str, Tensor]:
    return GraphOutputs(CONFIG).of(network, raw)[0]


@needs_onnx
def test_onnx_gives_the_same_outputs_at_any_size(run: Path, exported: Exported) -> None:
    session = OnnxSession(exported.file)
    for shape in SHAPES:
        images = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        expected, found = outputs_of(run, images), session(images)
        assert list(found) == list(expected) == ["lesion_logits", "class_logits", "boxes"]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


@needs_onnx
def test_onnx_runtime_finds_the_same_findings(run: Path, exported: Exported) -> None:
    """Mirror images are on here: they are put back by anchors that the graph does not give."""
    volume = make_phantom((7, 90, 75)).volume
    assert CONFIG.predict.flips
    assert_finds_the_same(run, volume)
    found = OnnxPredictor(run)(volume)
    assert found.model["engine"].startswith("onnxruntime")
    assert found.model["weights_sha256"] == Predictor(run, "cpu").about["weights_sha256"]


@needs_onnx
def test_the_exported_file_is_enough_without_the_run(
    run: Path, exported: Exported, tmp_path: Path
) -> None:
    for path in (exported.file, settings_path(exported.file)):
        shutil.copy(path, tmp_path)
    volume = make_phantom((3, 60, 50)).volume
    alone = OnnxPredictor(tmp_path / "model.onnx", score_thresh=0.3)(volume)
    beside = OnnxPredictor(run, score_thresh=0.3)(volume)
    assert [one.score for one in alone.findings] == [one.score for one in beside.findings]
    assert alone.score_thresh == 0.3


@needs_onnx
def test_the_settings_beside_the_file_say_how_to_use_it(exported: Exported) -> None:
    values = json.loads(settings_path(exported.file).read_text())
    assert values["input_name"] == "images"
    assert values["size_multiple"] == 16
    assert values["strides"] == [4, 8, 16]
    assert list(values["outputs"]) == ["lesion_logits", "class_logits", "boxes"]
    assert values["detector"]["class_names"] == ["dark", "bright"]
    assert values["detector"]["stack"]["window_hu"] == [-1000.0, 400.0]
    assert values["check"]["largest_difference"] <= TOLERANCE
    assert "phantom" in values["check"]["source"]
    assert len(values["check"]["sizes"]) >= 2
    assert {path.name for path in exported.file.parent.iterdir()} >= {"model.onnx"}
    assert not list(exported.file.parent.glob("*.data")), "weights are to be in the file itself"


@needs_onnx
def test_an_export_of_other_weights_is_refused(
    run: Path, exported: Exported, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    torch.manual_seed(1)
    save_weights(folder / "best.safetensors", build_retinanet(MODEL, 3, 2).state_dict(), {})
    with pytest.raises(UsageError, match="other weights"):
        OnnxPredictor(folder)
    shutil.copy(run / "best.safetensors", folder)
    save_detector_config(folder, with_score_thresh(CONFIG, 0.4))
    assert OnnxPredictor(folder).config.predict.score_thresh == 0.4
    stricter = CONFIG.predict.model_copy(update={"nms_thresh": 0.1})
    save_detector_config(folder, CONFIG.model_copy(update={"predict": stricter}))
    with pytest.raises(UsageError, match="other settings"):
        OnnxPredictor(folder)
    (folder / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="checksum"):
        find_exported(folder)
    settings_path(folder / "model.onnx").write_text("{}")
    with pytest.raises(InputError, match="not those that medvision wrote"):
        find_exported(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(UsageError, match="not been exported") as refused:
        find_exported(folder)
    assert f"medvision export {folder}" in str(refused.value)


@needs_onnx
def test_onnx_runtime_says_what_it_cannot_do(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cpu or cuda"):
        OnnxSession(exported.file, "mps")
    with pytest.raises(UsageError, match="without CUDA"):
        OnnxSession(exported.file, "cuda:0")
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="cannot load"):
        OnnxSession(tmp_path / "model.onnx")


def test_torchscript_gives_the_same_outputs_at_any_size(run: Path, tmp_path: Path) -> None:
    done = export_run(run, tmp_path / "nodules.pt", "torchscript")
    graph_alone = torch.jit.load(str(done.file))
    for shape in SHAPES:
        images = torch.rand(shape, generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            found = graph_alone(images)
        for value, expected in zip(found, outputs_of(run, images).values(), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
    assert load_exported(done.file).format == "torchscript"
    with pytest.raises(UsageError, match="torchscript"):
        find_exported(done.file)


SHORT: dict[str, Any] = {
    "blocks": (1, 1, 1, 1),
    "width": 8,
    "pyramid_channels": 8,
    "anchors_per_level": 1,
    "anchor_sizes": SIZES,
}
TWO_STAGE: dict[str, Any] = {
    **SHORT,
    # Fewer than the anchors of the finest level, more than those of the coarsest.
    "proposals": {"pre_nms_top_n": 40, "post_nms_top_n": 25},
    "level_rule": {"k0": 3, "canonical_size": 8.0},
}
FAMILY: dict[str, dict[str, Any]] = {
    "retina-unet": {**SHORT, "head_depth": 1},
    "unet": {"depth": 3, "base_channels": 4},
    "faster-rcnn": TWO_STAGE,
    "mask-rcnn": {**TWO_STAGE, "mask": {"depth": 1, "channels": 8}},
}


def test_a_two_stage_graph_with_one_level_finds_what_the_network_does() -> None:
    settings = {**TWO_STAGE, "pyramid": "finest-only", "anchor_sizes": SIZES[:1]}
    network = build_model(MODEL_CONFIGS["faster-rcnn"](**settings), 3, 2).eval()
    spread_out(network)
    thresholds = {"score_thresh": 0.0, "nms_thresh": 0.3, "detections_per_img": 10}
    graph = FixedLengths(network, **thresholds)  # type: ignore[arg-type]
    images = torch.rand(1, 3, 48, 64)
    with torch.inference_mode():
        expected = detect(network, images, flips=False, **thresholds)[0]  # type: ignore[arg-type]
        boxes, scores, *_ = graph(images)
    count = len(expected["scores"])
    assert count > 0
    torch.testing.assert_close(scores[:count], expected["scores"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(boxes[:count], expected["boxes"], atol=1e-3, rtol=1e-4)


def family_run(folder: Path, name: str, **changes: Any) -> Path:
    """Write a run of a model whose outputs are not all alike; ``changes`` go into its parts."""
    folder.mkdir()
    torch.manual_seed(0)
    parts = dict(FAMILY[name])
    for key, value in changes.items():
        parts[key] = {**parts.get(key, {}), **value} if isinstance(value, dict) else value
    config = CONFIG.model_copy(update={"model": MODEL_CONFIGS[name](**parts)})
    network = build_model(config.model, 3, 2)
    spread_out(network)
    save_detector_config(folder, config)
    save_weights(folder / "best.safetensors", network.state_dict(), {})
    return folder


def assert_finds_the_same(run: Path, volume: Volume) -> None:
    """Compare the findings of a run with those of its exported file, in float32."""
    network, config, _ = load_detector(run)
    expected = find_lesions(volume, network, config, choose_device("cpu", "float32"))
    found = OnnxPredictor(run)(volume)
    assert len(found.findings) == len(expected) > 0
    for one, other in zip(found.findings, expected, strict=True):
        assert one.class_name == other.class_name
        assert one.score == pytest.approx(other.score, abs=1e-4)
        np.testing.assert_allclose(one.box.lower, other.box.lower, atol=1e-2)
        np.testing.assert_allclose(one.box.upper, other.box.upper, atol=1e-2)


@pytest.mark.parametrize("name", FAMILY)
def test_every_model_is_exported_to_torchscript(name: str, tmp_path: Path) -> None:
    run = family_run(tmp_path / "run", name)
    done = export_run(run, format="torchscript")
    assert done.model.check.largest_difference <= TOLERANCE
    assert len(done.model.check.sizes) == 2
    assert ("masks" in done.model.outputs) == (name == "mask-rcnn")


class OneSizeOnly(nn.Module):
    """A graph whose trace holds the length of its example."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (images[0] * torch.arange(len(images[0, 0, 0])),)


def test_a_trace_that_fails_on_another_size_is_refused(tmp_path: Path) -> None:
    run = _write_torchscript(OneSizeOnly(), ["out"], torch.rand(1, 3, 4, 8), tmp_path / "a.pt")
    assert run(torch.ones(1, 3, 2, 8))["out"][0, 0].tolist() == list(range(8))
    with pytest.raises(InputError, match="fails on slices of 4 x 9 pixels"):
        run(torch.rand(1, 3, 4, 9))


def test_deformable_pooling_is_exported_to_torchscript(tmp_path: Path) -> None:
    run = family_run(tmp_path / "run", "faster-rcnn", regions={"pooling": "deformable"})
    done = export_run(run, format="torchscript")
    assert done.model.check.largest_difference <= TOLERANCE
    assert len(done.model.check.sizes) == 2


@pytest.mark.parametrize("kind", ["torchscript", pytest.param("onnx", marks=needs_onnx)])
def test_a_unet_on_a_deformable_resnet_is_exported(tmp_path: Path, kind: str) -> None:
    run = family_run(
        tmp_path / "run",
        "unet",
        encoder="resnet18",
        encoder_norm="frozen",
        encoder_convolution="deformable",
        depth=4,
    )
    done = export_run(run, format=kind)
    assert done.model.check.largest_difference <= TOLERANCE
    assert len(done.model.check.sizes) == 2


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_every_model_finds_the_same_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    run = family_run(tmp_path / "run", name)
    export_run(run)
    assert_finds_the_same(run, make_phantom((4, 64, 48)).volume)


def test_a_graph_that_differs_is_refused_and_leaves_no_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_little(module, names, images, path):  # type: ignore[no-untyped-def]
        path.write_bytes(b"graph")
        module = copy.deepcopy(module)  # the network itself calls what is returned here
        return lambda images: {
            name: value * (1 + 3e-4) for name, value in zip(names, module(images), strict=True)
        }

    monkeypatch.setitem(graph._WRITERS, "torchscript", off_by_little)
    with pytest.raises(InputError, match="own outputs") as refused:
        export_run(run, tmp_path / "model.pt", "torchscript")
    assert refused.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_slices_come_from_the_scan_given_then_the_cache_then_a_phantom(
    run: Path, tmp_path: Path
) -> None:
    import nibabel

    assert "phantom" in check_volumes(run, CONFIG, None)[0]
    (tmp_path / "cache").mkdir()
    array = np.full((6, 40, 50), -900, dtype=np.int16)
    np.save(tmp_path / "cache" / "case1.scan.npy", array)
    source, volumes = check_volumes(tmp_path, CONFIG, None)
    assert "case1" in source
    assert volumes[0].shape == (6, 40, 50)
    assert volumes[0].spacing_mm == pytest.approx((2.5, 0.7, 0.7))
    scan = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array.T, np.diag([1.4, 1.4, 2.0, 1.0])), scan)
    source, volumes = check_volumes(tmp_path, CONFIG, scan)
    assert str(scan) in source
    assert volumes[0].shape == (6, 80, 100), "resampled to the network's pixels"


def test_the_comparison_sees_two_sizes_and_several_slices(run: Path) -> None:
    network, config, _ = load_detector(run)
    volume = make_phantom((9, 64, 48)).volume
    twin, _, _ = load_detector(run)
    same = compare(
        network, lambda images: plain_outputs(twin, twin(images)), config, "test", [volume]
    )
    assert same.largest_difference == 0
    assert same.slices == 8
    assert len(same.sizes) == 2


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        ([0.0, 1.0], [0.0, 1.0], 0.0),
        ([0.0], [0.01], 0.01),
        ([100.0], [101.0], 0.01),
        ([1.0], [float("nan")], float("inf")),
        ([1.0], [1.0, 2.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_the_difference_is_relative_above_one(
    expected: list[float], found: list[float], difference: float
) -> None:
    result = largest_difference(torch.tensor(expected), torch.tensor(found))
    assert result == pytest.approx(difference, rel=1e-5)


def test_a_box_is_compared_with_its_largest_coordinate() -> None:
    expected = torch.tensor([[0.0, 0.0, 200.0, 100.0], [0.0, 0.0, 0.5, 0.5]])
    shifted = expected + torch.tensor([[0.02, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2e-5]])
    assert largest_difference(expected, shifted, boxes=True) == pytest.approx(1e-4, rel=1e-3)
    assert largest_difference(expected, shifted) == pytest.approx(0.02, rel=1e-3)


def test_the_graph_gives_tensors_and_no_anchors(run: Path) -> None:
    network, _, _ = load_detector(run)
    images = torch.rand(1, 3, 32, 32)
    found = graph_module(network, GraphOutputs(CONFIG))(images)
    assert len(found) == 3
    assert all(isinstance(value, Tensor) for value in found)


def test_missing_packages_are_told_with_the_command_that_installs_them() -> None:
    with pytest.raises(UsageError) as refused:
        require_packages(("numpy", "no_such_package"), "This")
    assert refused.value.do == "Run: python -m pip install no_such_package"
    require_packages(("numpy",), "This")


@pytest.mark.parametrize("command", ["export", "predict"])
def test_a_missing_runtime_is_told_at_once(
    command: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    (tmp_path / "scan.dcm").write_bytes(b"")
    words = {
        "export": ["export", str(run)],
        "predict": ["predict", str(run), str(tmp_path), "-o", "out", "--engine", "onnx"],
    }
    assert main(words[command]) == 2
    assert "python -m pip install" in capsys.readouterr().err


def test_the_command_exports_and_says_what_it_compared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out" / "nodules.pt"
    words = ["export", str(run), "--format", "torchscript", "-o", str(file), "--quiet"]
    assert main(words) == 0
    page = capsys.readouterr().out
    assert str(file) in page
    assert "phantom" in page
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["check"]["largest_difference"] <= TOLERANCE
    assert document["settings"] == f"{file}.json"
    assert main(["export", str(run), "-o", str(tmp_path)]) == 2
    assert main(["export", str(run), "--check", str(tmp_path / "nowhere")]) == 2


@needs_onnx
def test_the_command_predicts_with_the_exported_file(
    run: Path, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import nibabel

    array = make_phantom((4, 60, 50)).volume.array
    scan = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array.T, np.diag([0.7, 0.7, 2.0, 1.0])), scan)
    words = ["predict", str(run), str(scan), "--quiet", "-o"]
    assert main([*words, str(tmp_path / "onnx"), "--engine", "onnx"]) == 0
    assert main([*words, str(tmp_path / "torch")]) == 0
    alone = ["predict", str(exported.file), str(scan), "--quiet", "-o", str(tmp_path / "alone")]
    assert main(alone) == 2
    assert "--engine onnx" in capsys.readouterr().err
    assert main([*alone, "--engine", "onnx"]) == 0
    documents = {
        name: json.loads((tmp_path / name / "scan" / "findings.json").read_text())
        for name in ("onnx", "torch", "alone")
    }
    assert documents["onnx"]["findings"] == documents["alone"]["findings"]
    assert documents["onnx"]["model"]["engine"].startswith("onnxruntime")
    assert "engine" not in documents["torch"]["model"]
    first, second = (len(documents[name]["findings"]) for name in ("onnx", "torch"))
    assert first > 0
    assert second > 0


def test_the_help_page_is_complete_and_fast(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["export", "--help"]) == 0
    page = capsys.readouterr().out
    assert re.search(r"Examples?:\n +medvision export", page)
    assert max(len(line) for line in page.splitlines()) <= 80
    for example in re.findall(r"^  (medvision .*)$", export_command.EPILOG, re.MULTILINE):
        assert main([*example.split()[1:], "--help"]) == 0
    calls = [["export", "--help"], ["export"], ["export", "nowhere"], ["export", str(run), "-x"]]
    calls += [["export", str(run), "--format", "tflite"], ["export", str(run), "-o", str(run)]]
    calls += [["predict", "nowhere", str(run), "-o", "out", "--engine", "onnx"]]
    calls += [["predict", str(run / "no.onnx"), str(run), "-o", "out", "--engine", "onnx"]]
    code = (
        "import sys\n"
        "from medvision.cli.main import main\n"
        f"codes = [main(call) for call in {calls!r}]\n"
        "print(codes, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[0, 2, 2, 2, 2, 2, 2, 2] False"


def test_the_run_folder_stays_a_run_folder(run: Path) -> None:
    assert load_detector_config(run) == CONFIG
    assert check.TOLERANCE == 1e-4


def test_torchs_own_error_without_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert ran_out_of_memory(raised.value)
    assert not ran_out_of_memory(RuntimeError("The size of tensor a must match"))


def test_a_graph_that_runs_out_of_memory_is_not_called_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raised = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    )

    def exhausted(images: torch.Tensor) -> None:
        raise raised

    monkeypatch.setattr(torch.jit, "load", lambda path: exhausted)
    write = _write_torchscript
    module, images = torch.nn.Identity(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(RuntimeError, match="can't allocate") as caught:
        write(module, ["maps"], images, tmp_path / "graph.pt")(images)
    assert caught.value is raised


@needs_onnx
def test_a_file_that_memory_does_not_hold_is_not_called_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import onnxruntime

    def exhausted(*given: Any) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr(onnxruntime, "InferenceSession", exhausted)
    with pytest.raises(RuntimeError, match="allocate"):
        OnnxSession(tmp_path / "model.onnx")
