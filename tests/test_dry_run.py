"""The dry run: the published receptive fields, the data as they are, and nothing left behind."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import alexnet, resnet18, resnet50

from medvision import predict
from medvision.cli.main import main
from medvision.datasets.discover import find_cases, load_case
from medvision.errors import InputError, Interrupted
from medvision.models.backbones import build_backbone, make_backbone
from medvision.models.pyramid_config import PyramidConfig
from medvision.sample_data.phantoms import write_phantom_dataset
from medvision.training import recall
from medvision.training.config import TrainConfig, make_train_config
from medvision.training.cost import measure_cost, slices_looked_at
from medvision.training.dry_run import (
    BY_MODEL,
    FITTED,
    PERCENTILES,
    DryRun,
    describe_levels,
    dry_run,
    lesion_sides,
)
from medvision.training.prepare import prepare_data
from medvision.training.receptive_field import receptive_fields
from medvision.training.train import train

SMALL_MODEL = {"width": 8, "pyramid_channels": 8, "head_depth": 1}
SMALL = {
    "steps": 50,
    "max_minutes": 0,
    "batch_size": 2,
    "precision": "float32",
    "device": "cpu",
    "validation_fraction": 0.3,
    "stack": {"n_slices": 3},
    "sampling": {"crop_size": 32},
    "model": SMALL_MODEL,
}


def small(**changes: object) -> TrainConfig:
    return make_train_config({**SMALL, **changes}, "test")


def first_resnet50(weights: None) -> nn.Module:
    """Return the paper's ResNet-50: torchvision moved the stride of a stage to its 3 x 3 convolution."""
    network = resnet50(weights=weights)
    for stage in (network.layer2, network.layer3, network.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return network


@pytest.mark.parametrize(
    ("build", "part", "published"),
    [(resnet18, "layer4", 435), (first_resnet50, "layer4", 483), (alexnet, "features", 195)],
    ids=["resnet18", "resnet50", "alexnet"],
)
def test_receptive_fields_are_those_of_araujo_et_al(
    build: Callable[..., nn.Module], part: str, published: int
) -> None:
    """Distill 2019, table of architectures; ResNet-18 by their formula, as basic blocks add 2 x 2 a block."""
    network = build(weights=None)
    assert receptive_fields(network, part, 3, 32) == [published]


def test_the_field_follows_from_kernels_strides_and_dilation() -> None:
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(2, 2, 3, 1, 2, dilation=2),
    )
    # 3, then pooling of 2 at jump 2: 5; a dilated kernel covers 5 at jump 4: 5 + 4 * 4.
    assert receptive_fields(network, "0", 1, 4) == [5]
    assert receptive_fields(network, "1", 1, 4) == [21]


def test_a_field_wider_than_the_image_is_as_wide_as_the_largest_image() -> None:
    class SeesAll(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Conv2d(1, 1, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.map(images + images.mean(dim=(2, 3), keepdim=True))

    assert receptive_fields(SeesAll(), "map", 1, 4, largest=600) == [600]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_phantom_dataset(folder, 6)
    return folder


@pytest.fixture(scope="module")
def found(data: Path) -> DryRun:
    return dry_run(data, small(), {"steps": "--steps"})


def test_the_data_are_counted_as_they_are(data: Path, found: DryRun) -> None:
    cases = [load_case(case) for case in find_cases(data).cases]
    lesions = sum(len(case.annotations) for case in cases)
    assert found.training_scans + found.validation_scans == len(cases) == 6
    assert sum(found.lesions.values()) + sum(found.held_out_lesions.values()) == lesions
    assert found.healthy_scans == sum(not case.annotations for case in cases)
    assert set(found.lesions) == set(found.class_names)
    assert list(found.sizes.pixels) == sorted(found.sizes.pixels)
    for pixels, mm in zip(found.sizes.pixels, found.sizes.mm, strict=True):
        assert mm == pytest.approx(pixels * found.pixel_mm, abs=0.06)
    assert len(found.sizes.pixels) == len(PERCENTILES)


def test_the_network_is_described(found: DryRun) -> None:
    assert [level.stride for level in found.levels] == [4, 8, 16]
    # Stem 7, two blocks of two 3 x 3 a stage at jumps 2 to 16, one 3 x 3 on the coarsest level: by hand.
    stages = 7 + 4 * 2 * 2 + (2 * 2 + 3 * 2 * 4) + (2 * 4 + 3 * 2 * 8) + (2 * 8 + 3 * 2 * 16)
    assert found.levels[-1].receptive_field == stages + 2 * 16
    assert all(level.lesions_in_field == 1.0 for level in found.levels)
    assert 0 < found.trained_parameters <= found.parameters
    for level in found.levels:
        assert level.receptive_field_mm == pytest.approx(
            level.receptive_field * found.pixel_mm, abs=0.06
        )
        assert len(level.anchor_sizes) == 2


@pytest.mark.parametrize("kind", ["deformable", "deformable-v1", "dilated"])
def test_changed_convolutions_are_described_as_they_start(data: Path, kind: str) -> None:
    """Moved by the steps that are timed, deformable ones would see further than at the start."""
    found = dry_run(data, small(steps=2, model={**SMALL_MODEL, "stage_convolution": kind}))
    plain = dry_run(data, small(steps=2))
    fields = [[level.receptive_field for level in one.levels] for one in (found, plain)]
    assert fields[0] > fields[1] if kind == "dilated" else fields[0] == fields[1]
    assert found.parameters > plain.parameters or kind == "dilated"


def test_memory_is_that_of_training_not_of_the_description(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            calls.append(name)
            return real(*given)

        return call

    place = "medvision.training.dry_run"
    monkeypatch.setattr(f"{place}.measure_cost", noted("cost", measure_cost))
    monkeypatch.setattr(f"{place}.describe_levels", noted("levels", describe_levels))
    dry_run(data, small(steps=2))
    assert calls == ["cost", "levels"]


def test_levels_are_held_against_the_lesions(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = np.array([3.0, 5.0, 10.0, 1000.0])
    monkeypatch.setattr("medvision.training.dry_run.lesion_sides", lambda cases: sides)
    levels = dry_run(data, small(steps=2)).levels
    assert [level.stride for level in levels] == [4, 8, 16]
    assert [level.lesions_under_a_cell for level in levels] == [0.25, 0.5, 0.75]
    assert [level.lesions_in_field for level in levels] == [0.75, 0.75, 0.75]


def test_settings_are_resolved_with_their_sources(found: DryRun) -> None:
    listed = {item.name: item for item in found.settings}
    assert listed["steps"].source == "--steps"
    assert listed["batch_size"].source == "default"
    assert listed["model.anchor_sizes"].source == FITTED
    assert listed["model.anchor_sizes"].value
    assert listed["stack.pixel_mm"] == ("stack.pixel_mm", found.pixel_mm, FITTED)


def test_the_cost_adds_up(found: DryRun) -> None:
    cost = found.cost
    assert cost.steps_in_time == 50
    expected = cost.seconds_preparing + 50 * cost.seconds_per_step + cost.seconds_looking
    assert cost.seconds_in_all == pytest.approx(expected)
    assert cost.seconds_per_step > 0
    assert cost.seconds_per_slice > 0
    assert 100 < cost.memory_mib < 100_000


@pytest.mark.parametrize("name", ["retinanet", "mask-rcnn", "unet"])
def test_a_run_looks_at_as_many_slices_as_it_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes: dict[str, object] = {"name": name, "width": 8, "pyramid_channels": 8}
    if name == "unet":
        changes = {"name": name, "depth": 3, "base_channels": 4}
    # One look at a slice, also by the weights that are kept: mirror images count as shares of a look.
    config = small(model=changes, steps=4, predict={"flips": False, "scales": (1.0,)})
    seen = []
    for module in (predict, recall):
        real = module.stack_batches

        def counted(*given: Any, real: Any = real) -> Iterator[Any]:
            for numbers, batch in real(*given):
                seen.append(len(numbers))
                yield numbers, batch

        monkeypatch.setattr(module, "stack_batches", counted)
    train(data, tmp_path / "run", config)
    monkeypatch.undo()
    cases, _ = prepare_data(data, tmp_path / "cache", config, lambda _: None)
    assert sum(seen) == slices_looked_at(config, cases)


def test_a_time_limit_cuts_the_steps(data: Path) -> None:
    cost = dry_run(data, small(max_minutes=0.5, steps=1_000_000)).cost
    assert 0 < cost.steps_in_time < 1_000_000
    assert cost.seconds_in_all <= 30.0 + cost.seconds_preparing + cost.seconds_per_step


@pytest.mark.parametrize("name", ["mask-rcnn", "retina-unet", "unet"])
def test_every_model_has_a_dry_run(name: str, data: Path) -> None:
    changes = {"name": name, "width": 8, "pyramid_channels": 8}
    if name == "unet":
        changes = {"name": name, "depth": 3, "base_channels": 4}
    found = dry_run(data, small(model=changes))
    assert len(found.levels) == 3
    assert [level.stride for level in found.levels] == ([1, 2, 4] if name == "unet" else [4, 8, 16])
    assert list(found.strides) == ([1, 2, 4, 8] if name == "unet" else [4, 8, 16])
    assert found.cost.seconds_per_step > 0
    sources = {item.name: item.source for item in found.settings}
    # A U-Net looks in one size though nobody said so.
    assert sources["predict.scales"] == (BY_MODEL if name == "unet" else "default")
    assert sources["predict.flips"] == "default"


def test_nothing_is_left_behind(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(path.stat().st_mtime_ns for path in data.rglob("*"))
    with pytest.raises(Interrupted, match="nothing was kept"):
        dry_run(data, small(), should_stop=lambda: 2)
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.stat().st_mtime_ns for path in data.rglob("*")) == before


def test_it_refuses_what_training_refuses(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path / "data", 2, n_lesions=0)
    with pytest.raises(InputError, match="at least one lesion"):
        dry_run(tmp_path / "data", small())


def test_sides_are_those_of_the_boxes_that_count(data: Path, tmp_path: Path) -> None:
    from medvision.training.cache import cache_case

    loaded = load_case(find_cases(data).cases[0])
    case = cache_case(loaded, tmp_path, loaded.volume.spacing_mm[1], None)
    assert len(lesion_sides([case])) == len(loaded.annotations)
    assert np.all(lesion_sides([case]) >= 1)


def test_the_command_prints_everything_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", str(data), "-o", str(run), "--dry-run", "--quiet", "--steps", "3"]
    for name, value in {"stack.n_slices": 3, "sampling.crop_size": 32, "batch_size": 2}.items():
        words += ["--set", f"{name}={value}"]
    for name, value in {"width": 8, "pyramid_channels": 8}.items():
        words += ["--set", f"model.{name}={value}"]
    assert main(words) == 0
    page = capsys.readouterr().out
    for text in ("Settings", "Data", "Network", "Cost", "--steps", "--set", FITTED, "default"):
        assert text in page
    assert "50 %:" in page
    assert "transfer    scratch" in page
    assert "MiB" in page
    assert not run.exists()
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dry_run"]["parameters"] > 0
    assert document["settings_schema"]["properties"]["steps"]["minimum"] == 1
    assert not run.exists()


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_a_timm_backbone_has_a_receptive_field(name: str) -> None:
    pytest.importorskip("timm")
    network = nn.Sequential(build_backbone(f"timm/{name}", 2))
    fields = receptive_fields(network, "0", 2, 32)
    # At least the published field of its convolutions, and wider at every stage.
    assert fields == sorted(fields)
    assert fields[0] >= 4
    assert fields[-1] > 100


def test_frozen_norms_do_not_hide_what_a_field_holds() -> None:
    settings = {"norm": "frozen"}
    plain, frozen = (
        nn.Sequential(make_backbone(PyramidConfig.model_validate(given), 2))
        for given in ({}, settings)
    )
    assert receptive_fields(frozen, "0", 2, 32) == receptive_fields(plain, "0", 2, 32)


def test_what_learns_after_the_warm_up_is_not_called_frozen(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "resnet18.safetensors"
    save_file(build_backbone("resnet18", 3).state_dict(), file)
    model = {"backbone": "resnet18", "pyramid_channels": 8, "head_depth": 1}
    settings = {"model": model, "weights": str(file), "sampling": {"crop_size": 64}}
    learning = dry_run(data, small(**settings, transfer="finetune"))
    assert learning.trained_parameters == learning.parameters
    assert learning.transfer.startswith("finetune")
    frozen = dry_run(data, small(**settings, transfer="frozen"))
    assert frozen.transfer.startswith("frozen")
    assert file.name in frozen.transfer
    backbone = sum(value.numel() for value in build_backbone("resnet18", 6).parameters())
    assert frozen.parameters - frozen.trained_parameters == backbone
