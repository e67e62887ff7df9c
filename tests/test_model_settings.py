"""Settings of a model known by its name: their JSON Schema, and what is said of a wrong one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from medvision.cli.main import main
from medvision.cli.settings import resolve_config
from medvision.errors import UsageError
from medvision.models.family_config import MODEL_CONFIGS
from medvision.training.config import TrainConfig
from medvision.training.settings_help import _UNET_NAMES, settings_schema

HEAVY = ("torch", "torchvision", "albumentations", "cv2", "scipy", "SimpleITK", "matplotlib")
ACCEPTED = [
    "steps: 5",
    "model: {}",
    "model: {width: 16}",
    "weights: imagenet\nmodel: {backbone: resnet18, norm: frozen}",
    "model: {lesion_loss: varifocal}",
    "model: {name: retinanet}",
    "model: {name: retinanet, atss_candidates: 5}",
    "model: {name: faster-rcnn}",
    "model: {name: faster-rcnn, regions: {sampling: ohem}}",
    "model: {name: faster-rcnn, backbone: resnet50, proposals: {loss: sampled}}",
    "model: {name: mask-rcnn}",
    "model: {name: mask-rcnn, mask: {depth: 2}, regions: {pool_size: 5}}",
    "model: {name: retina-unet}",
    "model: {name: retina-unet, segmentation_stride: 1, matcher: iou}",
    "model: {name: retina-unet, segmentation_loss: {dice: 1}}",
    "model: {name: unet}",
    "model: {name: unet, depth: 3, norm: instance}",
    "model: {name: unet, encoder: resnet18, loss: {focal: 1.0}}",
]
REFUSED = [
    "stpes: 5",
    "model:",
    "model: unet",
    "model: [unet]",
    "model: {name: retinane}",
    "model: {name: }",
    "model: {name: 5}",
    "model: {depth: 3}",
    "model: {norm: instance}",
    "model: {width: 4}",
    "model: {segmentation_stride: 1}",
    "model: {name: retinanet, encoder: resnet18}",
    "model: {name: retinanet, segmentation_loss: {dice: 1}}",
    "model: {name: faster-rcnn, mask: {depth: 2}}",
    "model: {name: faster-rcnn, head_depth: 2}",
    "model: {name: faster-rcnn, regions: {sampling: all}}",
    "model: {name: mask-rcnn, mask: {depth: 0}}",
    "model: {name: mask-rcnn, lesion_loss: focal}",
    "model: {name: retina-unet, segmentation_stride: 4}",
    "model: {name: retina-unet, base_channels: 8}",
    "model: {name: unet, depth: 8}",
    "model: {name: unet, norm: frozen}",
    "model: {name: unet, backbone: resnet18}",
]
ALL_SETTINGS = {
    setting: value
    for config in MODEL_CONFIGS.values()
    for setting, value in config().model_dump(mode="json").items()
    if setting != "name"
}
CHECKER = jsonschema.Draft202012Validator(settings_schema(TrainConfig))


def training_accepts(text: str, folder: Path) -> bool:
    file = folder / "settings.yaml"
    file.write_text(text)
    try:
        resolve_config(file, [], {})
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("text", ACCEPTED)
def test_training_and_the_schema_accept_a_part_of_the_settings(text: str, tmp_path: Path) -> None:
    assert training_accepts(text, tmp_path)
    CHECKER.validate(yaml.safe_load(text))


@pytest.mark.parametrize("text", REFUSED)
def test_training_and_the_schema_refuse_what_a_model_has_not(text: str, tmp_path: Path) -> None:
    assert not training_accepts(text, tmp_path)
    assert not CHECKER.is_valid(yaml.safe_load(text))


@pytest.mark.parametrize("name", [None, *MODEL_CONFIGS])
def test_each_setting_of_any_model_is_accepted_where_the_model_has_it(
    name: str | None, tmp_path: Path
) -> None:
    known = MODEL_CONFIGS[name or "retinanet"].model_fields
    for setting, value in ALL_SETTINGS.items():
        model = {setting: value} if name is None else {"name": name, setting: value}
        assert training_accepts(json.dumps({"model": model}), tmp_path) == (setting in known)
        assert CHECKER.is_valid({"model": model}) == (setting in known), setting


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_the_settings_of_each_model_as_a_run_keeps_them_are_accepted(name: str) -> None:
    config, _ = resolve_config(None, [], {"model.name": name})
    CHECKER.validate(config.model_dump(mode="json"))
    assert MODEL_CONFIGS[name].model_json_schema()["properties"]["name"]["const"] == name


@pytest.mark.parametrize("text", ["model: {name: retinane}", "model: {name: unet, bakbone: a}"])
def test_an_editor_is_told_what_is_wrong_and_of_no_other_model(text: str) -> None:
    (error,) = CHECKER.iter_errors(yaml.safe_load(text))
    assert list(error.absolute_path)[:1] == ["model"]
    assert "retinane" in error.message or "bakbone" in error.message
    assert not error.context, "a list of what is wrong with every model"


def test_what_the_schema_does_not_say_is_as_its_docstring_has_it(tmp_path: Path) -> None:
    unfit = "model: {backbone: resnet18, width: 16}"
    assert CHECKER.is_valid(yaml.safe_load(unfit))
    assert not training_accepts(unfit, tmp_path)
    as_text = "steps: '5'"
    assert not CHECKER.is_valid(yaml.safe_load(as_text))
    assert training_accepts(as_text, tmp_path)


@pytest.mark.parametrize("words", [[], ["--json"], ["no/such/data", "-o", "no/such/run"]])
def test_the_command_prints_the_schema_without_data(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--schema", *words]) == 0
    printed = capsys.readouterr()
    document: dict[str, Any] = json.loads(printed.out)
    assert document == CHECKER.schema
    assert printed.err == ""
    jsonschema.Draft202012Validator.check_schema(document)


def test_the_schema_is_printed_without_torch() -> None:
    code = (
        "import sys\n"
        "from medvision.cli.main import main\n"
        "main(['train', '--schema'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["title"] == "TrainConfig"


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        (
            "{name: faster-rcnn, mask: {depth: 3}}",
            "model.mask",
            "It is a setting of mask-rcnn, not of faster-rcnn: leave it out, or take another model.",
        ),
        (
            "{segmentation_stride: 1}",
            "model.segmentation_stride",
            "It is a setting of retina-unet, not of retinanet: leave it out, or take another model.",
        ),
        (
            "{loss: {dice: 1}}",
            "model.loss",
            "It is a setting of unet, not of retinanet: leave it out, or take another model.",
        ),
        (
            "{encoder: resnet18}",
            "model.encoder",
            "It is a setting of unet; retinanet calls it model.backbone.",
        ),
        (
            "{name: unet, segmentation_loss: {dice: 1}}",
            "model.segmentation_loss",
            "It is a setting of retina-unet; unet calls it model.loss.",
        ),
        (
            "{name: mask-rcnn, mask.depth: 3}",
            "model.mask.depth",
            "In a file, parts are tables: write model: {mask: {depth: ...}}.",
        ),
        ("{name: mask-rcnn, maks: {depth: 3}}", "model.maks", "Did you mean model.mask?"),
    ],
)
def test_a_setting_of_another_model_is_refused_with_whose_it_is(
    text: str, key: str, remedy: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"model: {text}\n")
    with pytest.raises(UsageError) as refused:
        resolve_config(file, [], {})
    assert refused.value.what == f"There is no setting {key!r}."
    assert refused.value.do == remedy
    assert refused.value.where == str(file)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("backbone", "resnet18", "encoder"),
        ("stage_convolution", "dilated", "encoder_convolution"),
    ],
)
def test_what_the_unet_calls_otherwise_is_named(key: str, value: str, name: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve_config(None, [f"model.{key}={value}"], {"model.name": "unet"})
    assert f"unet calls it model.{name}." in (refused.value.do or "")
    with pytest.raises(UsageError) as refused:
        resolve_config(None, [f"model.{name}={value}"], {"model.name": "mask-rcnn"})
    assert f"mask-rcnn calls it model.{key}." in (refused.value.do or "")


def test_every_counterpart_is_a_setting_of_its_models() -> None:
    unet, others = MODEL_CONFIGS["unet"], set(MODEL_CONFIGS.values()) - {MODEL_CONFIGS["unet"]}
    for other_name, unet_name in _UNET_NAMES.items():
        assert unet_name in unet.model_fields
        assert any(other_name in other.model_fields for other in others)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("retinane", "; did you mean retinanet?"),
        ("UNet", "; did you mean unet?"),
        ("mask_rcnn", "; did you mean mask-rcnn?"),
        ("yolo", ""),
        ("null", ""),
        ("[unet]", "; did you mean unet?"),
    ],
)
def test_an_unknown_model_is_refused_with_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve_config(None, [f"model.name={name}", "model.width=16"], {})
    shown = repr(yaml.safe_load(name))
    assert refused.value.what == (
        f"The settings in 'model' are refused: unknown model {shown}{meant} "
        "(retinanet, faster-rcnn, mask-rcnn, retina-unet, unet)."
    )


def test_the_command_tells_the_name_that_was_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "scan.nii.gz").touch()
    words = ["train", str(tmp_path), "-o", str(tmp_path / "run")]
    assert main([*words, "--model", "unet", "--set", "model.backbone=resnet18"]) == 2
    assert "unet calls it model.encoder." in " ".join(capsys.readouterr().err.split())
    assert main([*words, "--set", "model.name=retinane"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "unknown model 'retinane'; did you mean retinanet? (retinanet, faster-rcnn," in error
    assert "retina-unet, unet)." in error
