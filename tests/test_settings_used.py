"""Settings that a run works out or refuses: before it reads, and as it writes them down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_support import small

from medvision.cli.settings import resolve_config
from medvision.device import choose_device
from medvision.errors import UsageError
from medvision.models.backbones import build_backbone
from medvision.models.criterion import Criterion
from medvision.models.faster_rcnn import FasterRCNNCriterion
from medvision.models.roi_levels import fit_level_rule
from medvision.models.unet_criterion import SegmentationCriterion
from medvision.training.config import TrainConfig, make_train_config
from medvision.training.dry_run import FITTED, dry_run
from medvision.training.prepare import fit_detector, prepare_data, slice_box_sizes
from medvision.training.train import make_trainer, train

TWO_STAGE = {"name": "faster-rcnn", "width": 8, "pyramid_channels": 8, "regions": {"width": 16}}
UNET = {"name": "unet", "base_channels": 4, "depth": 3}


def trainer_of(data: Path, run: Path, config: TrainConfig) -> tuple[Any, tuple[str, ...]]:
    cases, pixel_mm = prepare_data(data, run, config, lambda _: None)
    detector = fit_detector(cases, config, pixel_mm)
    trainer = make_trainer(config, detector, cases, choose_device("cpu", "float32"))
    return trainer, detector.class_names


def weights_of(criterion: object) -> torch.Tensor:
    """Return ``[classes]``; where the background has a weight too, it is the first."""
    if isinstance(criterion, SegmentationCriterion):
        return criterion.class_weights[1:]
    if isinstance(criterion, FasterRCNNCriterion):
        return criterion.get_buffer("weights")[1:]
    assert isinstance(criterion, Criterion)
    return criterion.class_weights


@pytest.mark.parametrize("model", [{"width": 8}, TWO_STAGE, UNET], ids=["retinanet", "two", "unet"])
def test_a_class_has_the_weight_that_it_was_given(
    phantom_data: Path, tmp_path: Path, model: dict[str, object]
) -> None:
    given = small(model=model, class_weights={"solid": 2.5})
    trainer, names = trainer_of(phantom_data, tmp_path, given)
    weights = dict(zip(names, weights_of(trainer.criterion).tolist(), strict=True))
    assert weights.pop("solid") == 2.5
    assert weights
    assert set(weights.values()) == {1.0}


def test_without_any_the_weights_follow_from_the_counts(phantom_data: Path, tmp_path: Path) -> None:
    trainer, names = trainer_of(phantom_data, tmp_path, small())
    cases, _ = prepare_data(phantom_data, tmp_path, small(), lambda _: None)
    found = [item.class_name for case in cases.training for item in case.annotations()]
    roots = np.array([max(found.count(name), 1) for name in names]) ** -0.5
    expected = torch.tensor(roots / roots.mean(), dtype=torch.float32)
    torch.testing.assert_close(weights_of(trainer.criterion), expected)


def test_a_weight_of_a_class_that_is_not_there_is_refused(
    phantom_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="names a class that no lesion has: 'sollid'") as refused:
        train(phantom_data, tmp_path, small(class_weights={"sollid": 2.0}))
    assert "Did you mean solid?" in str(refused.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "unet", "encoder": "resnet18", "depth": 3}, "Set depth to 4"),
        ({"name": "unet", "encoder": "resnet17", "depth": 4}, "Did you mean resnet18"),
        ({"backbone": "resnet19", "stem_pooling": True}, "Did you mean resnet1"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_before_any_scan_is_read(
    tmp_path: Path, model: dict[str, object], words: str
) -> None:
    run = tmp_path / "run"
    for refuse in (lambda c: train(tmp_path / "none", run, c), lambda c: dry_run(tmp_path, c)):
        with pytest.raises(UsageError, match=words):
            refuse(small(model=model, sampling={"crop_size": 32}))
    assert not list(run.glob("*.json"))


@pytest.mark.parametrize(
    "model",
    [
        {"backbone": "resnet18", "norm": "frozen"},
        {"name": "faster-rcnn", "backbone": "resnet50", "norm": "frozen"},
        {"name": "unet", "encoder": "resnet18", "encoder_norm": "frozen"},
    ],
)
def test_frozen_norms_without_weights_are_refused(model: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="frozen norms keep the statistics of pretrained weights"):
        small(model=model)


def test_a_deep_network_with_frozen_statistics_of_no_weights_would_overflow() -> None:
    """Why they are refused: the residual branches of 50 blocks add up."""
    torch.manual_seed(0)
    backbone = build_backbone("resnet152", 3, norm="frozen").eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 64, 64))[-1].std() > 1e4


def test_the_level_rule_is_fitted_to_the_boxes_and_written_down(
    phantom_data: Path, tmp_path: Path
) -> None:
    config = small(model=TWO_STAGE)
    train(phantom_data, tmp_path / "run", config)
    written = json.loads((tmp_path / "run" / "detector.json").read_text())["model"]["level_rule"]
    cases, _ = prepare_data(phantom_data, tmp_path / "cache", config, lambda _: None)
    k0, canonical = fit_level_rule(slice_box_sizes(cases.training), config.model.strides)
    assert written == {"k0": k0, "canonical_size": canonical}
    listed = {item.name: item for item in dry_run(phantom_data, config).settings}
    for name in ("k0", "canonical_size"):
        assert listed[f"model.level_rule.{name}"].value == written[name]
        assert listed[f"model.level_rule.{name}"].source == FITTED


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"model": {"name": "faster-rcnn", "stage_convolution": "x"}}, "'model.stage_convolution'"),
        ({"model": {"name": "unet", "loss": {"dice": -1}}}, "'model.loss.dice'"),
        ({"model": {"inner_windows": [[0.5, 0.5]]}}, "The settings in 'model' are"),
        ({"model": {"name": "unet", "loss": {"dice": 0, "cross_entropy": 0}}}, "in 'model.loss'"),
        ({"steps": 0}, "'steps'"),
        ({"sampling": {"crop_size": 1}}, "'sampling.crop_size'"),
        ({"class_weights": {"solid": 0}}, "'class_weights.solid'"),
        ({"transfer": "frozen"}, "The settings are refused"),
    ],
)
def test_a_refused_setting_has_the_name_that_one_writes(
    settings: dict[str, object], name: str
) -> None:
    with pytest.raises(UsageError) as refused:
        make_train_config(settings, "test")
    assert name in refused.value.what


@pytest.mark.parametrize("words", ["class_weights.solid=2.5", "class_weights={solid: 2.5}"])
def test_a_class_weight_can_be_set_on_the_command_line(words: str) -> None:
    config, sources = resolve_config(None, [words], {})
    assert config.class_weights == {"solid": 2.5}
    assert sources["class_weights"] == "--set"
    with pytest.raises(UsageError, match="Did you mean class_weights"):
        resolve_config(None, ["class_weight.solid=2"], {})
