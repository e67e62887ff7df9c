"""Training on lesions known by a box alone: their boxes are learned, and no outline that nobody drew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_support import case_with, small

from medvision.detector import DetectorConfig
from medvision.errors import InputError
from medvision.findings.config import PredictConfig
from medvision.geometry import Box
from medvision.labels.annotation import Annotation
from medvision.models.criterion import Criterion
from medvision.models.retinanet import RawDetections
from medvision.sample_data.phantoms import write_phantom_dataset
from medvision.stacks.config import StackConfig
from medvision.training import cache
from medvision.training.cache import cache_case
from medvision.training.config import TrainConfig
from medvision.training.crops import training_crops
from medvision.training.loop import Trainer
from medvision.training.train import train

PARTS: dict[str, dict[str, object]] = {
    "mask-rcnn": {"width": 8, "pyramid_channels": 8, "mask": {"channels": 8, "depth": 1}},
    "retina-unet": {"width": 8, "pyramid_channels": 8, "segmentation_channels": 8},
    "unet": {"base_channels": 4, "depth": 3},
}


def small_model(name: str, **changes: object) -> TrainConfig:
    # Sums on a GPU come in no fixed order, and results are compared bit by bit.
    given = {"steps": 4, "validation_fraction": 0.0, "device": "cpu"}
    return small(**{**given, "model": {"name": name, **PARTS.get(name, {})}, **changes})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of which two scans have label volumes and two the boxes of their lesions."""
    folder = tmp_path_factory.mktemp("mixed")
    write_phantom_dataset(folder, 4, healthy_every=0)
    for name in ("phantom_000", "phantom_002"):
        (folder / "labels" / f"{name}.nii.gz").unlink()
    return folder


@pytest.fixture(scope="module")
def boxes_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    write_phantom_dataset(folder, 3, healthy_every=3)
    for path in (folder / "labels").glob("*.nii.gz"):
        path.unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "instead"),
    [("mask-rcnn", "faster-rcnn"), ("retina-unet", "retinanet"), ("unet", "retinanet")],
)
def test_a_model_that_draws_refuses_boxes_alone(
    boxes_alone: Path, tmp_path: Path, name: str, instead: str
) -> None:
    with pytest.raises(InputError, match=rf"{name} .* all 6 in the 3 training scans") as refused:
        train(boxes_alone, tmp_path / "run", small_model(name))
    assert f"--model {instead}" in str(refused.value)
    assert str(boxes_alone) in str(refused.value)
    assert not (tmp_path / "run" / "detector.json").exists()


def test_a_detector_learns_from_boxes_alone(boxes_alone: Path, tmp_path: Path) -> None:
    config = small(steps=1, validation_fraction=0.0)
    assert sum(train(boxes_alone, tmp_path, config).lesions.values()) == 6


def test_a_mask_for_each_class_needs_an_outline_of_each(tmp_path: Path) -> None:
    write_phantom_dataset(tmp_path, 2, healthy_every=0, n_lesions=1)
    (tmp_path / "labels" / "phantom_000.nii.gz").unlink()
    mask = {"channels": 8, "depth": 1, "per_class": True}
    names = [(tmp_path / "labels" / f"phantom_00{n}.csv").read_text().split(",") for n in (0, 1)]
    classes = [
        next(part for part in row if part in ("ground_glass", "part_solid", "solid"))
        for row in names
    ]
    assert classes[0] != classes[1]
    config = small_model("mask-rcnn", model={"name": "mask-rcnn", "mask": mask})
    with pytest.raises(InputError, match=f"each class needs .* {classes[0]} all have a box") as no:
        train(tmp_path, tmp_path / "run", config)
    assert "per_class=false" in str(no.value)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("unet", "they are left out, as U-Net"),
        ("retina-unet", "their boxes are learned"),
        ("retinanet", ""),
    ],
)
def test_it_is_told_how_many_lesions_have_no_outline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, use: str
) -> None:
    drawn = Annotation(5, "other", Box(2, 4, 4, 3, 6, 6), np.ones((1, 2, 2), bool))
    marked = [Annotation(n, "solid", Box(4 * n, 10, 6, 4 * n + 3, 20, 16)) for n in (1, 2)]
    loaded = case_with(drawn, *marked)
    case = cache_case(loaded, tmp_path, loaded.volume.spacing_mm[1], (-1000, 400))
    config = small_model(name)
    detector = DetectorConfig(
        class_names=("other", "solid"),
        stack=StackConfig(n_slices=3),
        model=config.model,
        predict=PredictConfig(),
    )
    crops = training_crops([case], detector, config)
    assert len(crops.lesions) == (1 if name == "unet" else 3)
    if name == "retinanet":
        assert caplog.text == ""
        return
    assert f"2 of 3 lesions have a box and no outline: {use}" in caplog.text
    assert "Of class solid no lesion has an outline. The first is in one." in caplog.text
    caplog.clear()
    training_crops([replace(case, boxed={})], detector, config)
    assert caplog.text == ""


def test_mask_r_cnn_learns_masks_from_the_outlined_alone(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float, bool]] = []
    step = Trainer.step

    def noted(self: Trainer, images: Any, targets: Any, *given: Any) -> Any:
        before = self.network.mask_branch.head.mask.weight.clone()
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0
        losses = step(self, images, targets, *given)
        moved = not torch.equal(before, self.network.mask_branch.head.mask.weight)
        outlined = sum(int(target["masks"].flatten(1).any(dim=1).sum()) for target in targets)
        seen.append((outlined, losses["mask"], moved))
        return losses

    monkeypatch.setattr(Trainer, "step", noted)
    sampling = {"crop_size": 32, "lesion_share": 1.0, "paste_share": 0.0}
    train(mixed, tmp_path, small_model("mask-rcnn", steps=12, batch_size=1, sampling=sampling))
    without = [loss for outlined, loss, _ in seen if not outlined]
    learned = [loss for outlined, loss, _ in seen if outlined]
    assert len(without) > 2
    assert set(without) == {0.0}
    assert len(learned) > 2
    assert min(learned) > 0
    first = next(index for index, (outlined, _, _) in enumerate(seen) if outlined)
    assert [moved for _, _, moved in seen[: first + 1]] == [False] * first + [True]


@pytest.mark.parametrize(("name", "loss"), [("unet", "loss"), ("retina-unet", "segmentation_loss")])
def test_what_is_guessed_of_an_outline_changes_no_weight_that_a_segmentation_teaches(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, loss: str
) -> None:
    """Ellipsoid, whole box or a single voxel: were any of it learned, the weights would differ."""

    def no_loss(self: Criterion, raw: RawDetections, targets: object) -> dict[str, torch.Tensor]:
        return {"lesion": 0 * (raw.lesion_logits.sum() + raw.boxes.sum() + raw.class_logits.sum())}

    def whole(box: Box, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape, bool)

    def voxel(box: Box, shape: tuple[int, ...]) -> np.ndarray:
        return np.arange(np.prod(shape)).reshape(shape) == 0

    # The boxes of Retina U-Net's detector, and where crops are drawn and pasted, do follow the guess.
    monkeypatch.setattr(Criterion, "forward", no_loss)
    shares = {"lesion_share": 0.3 if name == "unet" else 0.0, "paste_share": 0.0, "hard_share": 0.0}
    model = {"name": name, **PARTS[name], loss: {"border_weight": 5.0}}
    config = small_model(name, steps=8, sampling={"crop_size": 32, **shares}, model=model)
    train(mixed, tmp_path / "ellipsoid", config)
    first = load_file(tmp_path / "ellipsoid" / "last.safetensors")
    for guess in (whole, voxel):
        monkeypatch.setattr(cache, "ellipsoid_in_box", guess)
        train(mixed, tmp_path / guess.__name__, config)
        second = load_file(tmp_path / guess.__name__ / "last.safetensors")
        assert all(torch.equal(first[key], second[key]) for key in first)
