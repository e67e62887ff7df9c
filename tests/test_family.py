"""Every model of the family through files and back: trained a few steps, predicted, evaluated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_support import small, train_until

from medvision.detector import load_detector_config
from medvision.models.family import build_criterion, build_model, detect
from medvision.models.family_config import MODEL_CONFIGS
from medvision.models.unet import RawSegmentation
from medvision.predict import Predictor
from medvision.sample_data.phantoms import make_phantom, write_phantom_dataset
from medvision.training import session
from medvision.training.config import TrainConfig
from medvision.training.crops import training_crops
from medvision.training.samples import CropSampler
from medvision.training.targets import CropLabel, make_target
from medvision.training.train import train

SMALL_PARTS: dict[str, dict[str, object]] = {
    "retinanet": {"width": 8, "pyramid_channels": 8, "head_depth": 1},
    "faster-rcnn": {"width": 8, "pyramid_channels": 8, "regions": {"width": 16}},
    "mask-rcnn": {"width": 8, "pyramid_channels": 8, "mask": {"channels": 8, "depth": 1}},
    "retina-unet": {"width": 8, "pyramid_channels": 8, "segmentation_channels": 8},
    "unet": {"base_channels": 4, "depth": 3},
}


def small_model(
    name: str, model: dict[str, object] | None = None, **changes: object
) -> TrainConfig:
    parts = {"name": name, **SMALL_PARTS[name], **(model or {})}
    return small(**{"steps": 4, "model": parts, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_phantom_dataset(folder, 5)
    return folder


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_each_model_goes_from_scans_to_findings(data: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    summary = train(data, run, small_model(name))
    assert summary.steps == 4
    assert load_detector_config(run).model.name == name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recalls = [line["proposals"]["all"] for line in lines if "proposals" in line]
    assert len(recalls) == (2 if name in ("faster-rcnn", "mask-rcnn") else 0)
    assert all(0 <= recall["recall"] <= 1 and recall["boxes"] > 0 for recall in recalls)
    assert summary.proposal_recall == (recalls[-1]["recall"] if recalls else None)
    volume = make_phantom().volume
    found = Predictor(run, "cpu", score_thresh=0.0)(volume)
    again = Predictor(run, "cpu", score_thresh=0.0)(volume)
    assert [item.score for item in found.findings] == [item.score for item in again.findings]
    for item in found.findings:
        assert 0 <= item.score <= 1
        assert item.mask is not None
        assert item.mask.any()
        assert sum(item.class_scores.values()) == pytest.approx(item.score, abs=1e-3)
        assert (item.box.lower >= 0).all()
        assert (item.box.upper <= np.array(volume.shape)).all()


@pytest.mark.parametrize(
    ("name", "model"), [("mask-rcnn", {}), ("unet", {}), ("unet", {"dropout": 0.5})]
)
def test_each_model_resumes_to_the_same_bits(
    data: Path, tmp_path: Path, name: str, model: dict[str, object]
) -> None:
    # Sums on a GPU come in no fixed order; the promise is for a CPU.
    config = small_model(name, model, device="cpu")
    train(data, tmp_path / "straight", config)
    train_until(2, data, tmp_path / "stopped", config)
    torch.manual_seed(99)  # another process draws other numbers
    train(data, tmp_path / "stopped", config, resume=True)
    first, second = (
        load_file(tmp_path / run / "last.safetensors") for run in ("straight", "stopped")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["faster-rcnn", "mask-rcnn", "retina-unet"])
def test_mirror_images_and_the_slice_itself_tell_the_same(
    data: Path, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    train(data, run, small_model(name, steps=1))
    network = Predictor(run, "cpu").network
    images = torch.rand(2, 3, 48, 64)
    settings = {"score_thresh": 0.0, "nms_thresh": 0.3, "detections_per_img": 5}
    with torch.no_grad():
        there = detect(network, images, flips=True, **settings)  # type: ignore[arg-type]
        back = detect(network, images.flip((-1,)), flips=True, **settings)  # type: ignore[arg-type]
    for first, second in zip(there, back, strict=True):
        torch.testing.assert_close(first["scores"], second["scores"], atol=1e-4, rtol=1e-3)
        mirrored = second["boxes"][0][[2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
        mirrored = mirrored + torch.tensor([64.0, 0, 64, 0])
        torch.testing.assert_close(first["boxes"][0], mirrored, atol=0.05, rtol=0)
        if name != "faster-rcnn":
            assert first["masks"].shape[1:] == (48, 64)


def train_keeping(
    made: list[CropSampler],
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
    run: Path,
    config: TrainConfig,
) -> None:
    """Train, and put the crops that it was trained on into ``made``."""

    def kept(*given: Any) -> CropSampler:
        made.append(training_crops(*given))
        return made[-1]

    monkeypatch.setattr(session, "training_crops", kept)
    train(data, run, config)


@pytest.mark.parametrize(("name", "part"), [("unet", "loss"), ("retina-unet", "segmentation_loss")])
def test_borders_between_close_lesions_get_their_weight(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: str
) -> None:
    plain = small_model(name, steps=1)
    loss = getattr(plain.model, part).model_copy(update={"border_weight": 7.0, "border_sigma": 9.0})
    model = plain.model.model_copy(update={part: loss})
    weighted = plain.model_copy(update={"model": model})
    train_keeping(made := [], monkeypatch, data, tmp_path / "run", weighted)
    train_keeping(made, monkeypatch, data, tmp_path / "plain", plain)
    targets = [made[0][index].target for index in range(12)]
    assert all("added_weights" in target for target in targets)
    assert not any("added_weights" in made[1][index].target for index in range(12))
    # Two lesions in one crop, so that there is a border; the phantoms' own are rarely that close.
    labels = np.zeros((32, 32), dtype=np.uint8)
    labels[10:14, 8:12], labels[10:14, 15:19] = 1, 2
    target = make_target(labels, [CropLabel(0, 16, True)] * 2, 0.5, made[0].outlines)
    expected = 7 * math.exp(-((2 + 2) ** 2) / (2 * 9**2))
    assert target["added_weights"][12, 13] == pytest.approx(expected)
    assert target["added_weights"][12, 9] == 0
    # And the loss follows: with logits that call everything lesion, borders cost more.
    criterion = build_criterion(weighted.model, torch.ones(2))
    unweighted = {key: value for key, value in target.items() if key != "added_weights"}
    logits = torch.zeros(1, 3, 32, 32)
    logits[:, 1:] = 2.0
    raw: Any = RawSegmentation(logits, ())
    if name == "retina-unet":
        size = {"anchor_sizes": (((8.0, 8.0), (4.0, 4.0)),) * len(model.strides)}
        network = build_model(model.model_copy(update=size), 3, 2).eval()
        raw = network(torch.zeros(1, 3, 32, 32))._replace(segmentation_logits=logits)
    with_border, without = (criterion(raw, [item]) for item in (target, unweighted))
    assert sum(with_border.values()) > sum(without.values())


@pytest.mark.parametrize(
    ("name", "part", "kept"),
    [
        ("unet", "loss", {"dice": 1.0, "cross_entropy": 1.0, "background_weight": 0.05}),
        ("retina-unet", "segmentation_loss", {"dice": 0.5, "cross_entropy": 0.5}),
    ],
)
def test_setting_one_weight_of_a_loss_leaves_the_others(
    name: str, part: str, kept: dict[str, float]
) -> None:
    config = TrainConfig.model_validate({"model": {"name": name, part: {"border_weight": 10.0}}})
    loss = getattr(config.model, part)
    assert loss.border_weight == 10
    assert {key: getattr(loss, key) for key in kept} == kept
    default = getattr(TrainConfig.model_validate({"model": {"name": name}}).model, part)
    assert loss == default.model_copy(update={"border_weight": 10.0})


@pytest.mark.parametrize(("name", "outlined"), [("retinanet", False), ("unet", True)])
def test_only_models_that_draw_are_given_outlines(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, outlined: bool
) -> None:
    train_keeping(made := [], monkeypatch, data, tmp_path / "run", small_model(name, steps=1))
    targets = [made[0][index].target for index in range(12)]
    assert all(("masks" in target) is outlined for target in targets)
    if not outlined:
        return
    for target in targets:
        masks, class_map = target["masks"], target["class_map"]  # type: ignore[typeddict-item]
        assert len(masks) == len(target["boxes"])
        for mask, label, box in zip(masks, target["labels"], target["boxes"], strict=True):
            assert (class_map[mask] == label + 1).all()
            rows, columns = mask.nonzero(as_tuple=True)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert torch.stack(edges).tolist() == box.tolist()
