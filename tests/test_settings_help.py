"""Settings by name: the nearest known one, the sources, and the JSON Schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from medvision.cli.settings import resolve_config
from medvision.errors import UsageError
from medvision.training.config import TrainConfig, make_train_config
from medvision.training.settings_help import (
    flat_settings,
    given_names,
    list_settings,
    nearest_settings,
    setting_names,
    settings_schema,
    suggestion,
    unknown_in_file,
)


class Wide(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int = 8
    depth: int = 2


class Deep(BaseModel):
    model_config = ConfigDict(extra="forbid")
    layers: tuple[int, ...] = (1, 2)
    depth: int = 9


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: int = Field(3, ge=1, description="how many")
    part: Wide | Deep = Wide()
    none: Deep | None = None


def test_parts_of_several_kinds_give_all_their_names_once() -> None:
    assert setting_names(Whole) == [
        "steps",
        "part.width",
        "part.depth",
        "part.layers",
        "none.layers",
        "none.depth",
    ]


@pytest.mark.parametrize(
    ("key", "best"),
    [
        ("stpes", "steps"),
        ("crop_size", "sampling.crop_size"),
        ("crop_sise", "sampling.crop_size"),
        ("sampling.crop_sise", "sampling.crop_size"),
        ("samplng.crop_size", "sampling.crop_size"),
        ("learning-rate", "learning_rate"),
        ("predict.seed", "seed"),
        ("nms_threshold", "predict.nms_thresh"),
    ],
)
def test_the_nearest_setting_is_the_one_meant(key: str, best: str) -> None:
    assert nearest_settings(key, setting_names(TrainConfig))[0] == best


def test_without_anything_alike_the_known_ones_are_listed() -> None:
    assert suggestion("qqqq", ["b", "a"]) == "Known: a, b."
    many = [f"name{number}" for number in range(11)]
    assert suggestion("qqqq", many).endswith(" and 3 more.")
    assert nearest_settings("qqqq", ["b", "a"]) == []


@given(st.sampled_from(setting_names(TrainConfig)))
def test_a_known_name_is_nearest_to_itself(name: str) -> None:
    assert name in nearest_settings(name, setting_names(TrainConfig), most=100)


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("stpes: 3", "stpes", "Did you mean steps"),
        ("sampling: {crop_sise: 64}", "sampling.crop_sise", "Did you mean sampling.crop_size"),
        ("crop_size: 64", "crop_size", "Did you mean sampling.crop_size"),
        ("samplng: {crop_size: 64}", "samplng", "Did you mean sampling"),
        ("sampling.crop_size: 64", "sampling.crop_size", "sampling: {crop_size: ...}"),
        ("steps: no\nstpes: 3", "stpes", "Did you mean steps"),
    ],
)
def test_an_unknown_setting_in_a_file_is_refused_with_the_nearest(
    text: str, key: str, remedy: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        resolve_config(file, [], {})
    assert refused.value.what == f"There is no setting {key!r}."
    assert remedy in (refused.value.do or "")
    assert refused.value.where == str(file)


def test_an_unknown_setting_of_a_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError) as refused:
        make_train_config({"model": {"pyramid_chanels": 8}}, "test")
    assert refused.value.what == "There is no setting 'model.pyramid_chanels'."
    assert refused.value.do == "Did you mean model.pyramid_channels?"
    with pytest.raises(UsageError) as refused:
        make_train_config({"model": {"name": "unet", "pyramid_channels": 8}}, "test")
    assert refused.value.do == (
        "It is a setting of retinanet, faster-rcnn, mask-rcnn, retina-unet, not of unet: "
        "leave it out, or take another model."
    )
    with pytest.raises(UsageError) as refused:
        make_train_config({"model": {"name": "mask-rcnn", "mask": {"dept": 8}}}, "test")
    assert refused.value.what == "There is no setting 'model.mask.dept'."
    assert refused.value.do == "Did you mean model.mask.depth?"
    with pytest.raises(UsageError, match="steps"):
        make_train_config({"steps": 0}, "test")


def test_a_table_is_offered_for_a_misspelt_table() -> None:
    assert unknown_in_file(("prat",), Whole) == ("prat", "Did you mean part?")


def test_every_value_has_its_source(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 10\nseed: 11\nsampling: {crop_size: 64}\n")
    pairs = ["seed=21", "predict.flips=false"]
    config, sources = resolve_config(file, pairs, {"max_minutes": 5.0, "device": None})
    assert sources == {
        "steps": str(file),
        "sampling.crop_size": str(file),
        "seed": "--set",
        "predict.flips": "--set",
        "max_minutes": "--max-minutes",
    }
    listed = {item.name: (item.value, item.source) for item in list_settings(config, sources)}
    assert listed["sampling.crop_size"] == (64, str(file))
    assert listed["seed"] == (21, "--set")
    assert listed["batch_size"] == (24, "default")
    assert set(listed) <= set(setting_names(TrainConfig))


def test_another_model_starts_from_its_own_defaults(tmp_path: Path) -> None:
    config, sources = resolve_config(None, ["model.name=unet", "model.depth=3"], {})
    assert (config.model.name, config.model.strides) == ("unet", [1, 2, 4, 8])
    assert sources == {"model.name": "--set", "model.depth": "--set"}
    config, sources = resolve_config(None, [], {"model.name": "faster-rcnn"})
    assert config.model.name == "faster-rcnn"
    assert sources == {"model.name": "--model"}
    file = tmp_path / "settings.yaml"
    file.write_text("model: {atss_candidates: 5}\n")
    with pytest.raises(UsageError, match=r"model\.atss_candidates"):
        resolve_config(file, ["model.name=unet"], {})


def test_a_value_given_again_as_it_is_by_default_counts_as_given(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"batch_size: {TrainConfig().batch_size}\n")
    assert resolve_config(file, [], {})[1] == {"batch_size": str(file)}


def test_only_what_is_given_is_named() -> None:
    names = setting_names(Whole)
    assert given_names({"part": {"width": 1}, "none": None}, names) == ["part.width"]
    assert dict(flat_settings(Whole(part=Deep()))) == {
        "steps": 3,
        "part.layers": (1, 2),
        "part.depth": 9,
        "none": None,
    }


def test_the_schema_accepts_the_defaults_and_refuses_what_pydantic_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = settings_schema(TrainConfig)
    checker = jsonschema.Draft202012Validator(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    checker.validate(TrainConfig().model_dump(mode="json"))
    for wrong in ({"stpes": 3}, {"steps": 0}, {"sampling": {"crop_size": "many"}}):
        assert not checker.is_valid(wrong)
    assert schema["properties"]["steps"]["description"] == "batches to train on"


def test_settings_are_explained_without_torch() -> None:
    code = (
        "import sys, medvision.training.settings_help, medvision.cli.settings\n"
        "print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_option_may_give_what_a_setting_in_the_file_asks_for(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("transfer: finetune\nmodel: {backbone: timm/convnext_atto}\n")
    config, sources = resolve_config(file, ["model.stem_pooling=true"], {"weights": "imagenet"})
    assert config.weights == "imagenet"
    assert sources["transfer"] == str(file)
    assert sources["model.stem_pooling"] == "--set"


def test_a_model_given_as_a_word_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model: unet\n")
    with pytest.raises(UsageError, match=r"must be a table, such as \{name: unet\}; got 'unet'"):
        resolve_config(file, [], {})
    with pytest.raises(UsageError, match="must be a table"):
        resolve_config(file, ["model.width=16"], {})
    file.write_text("model:\n")
    with pytest.raises(UsageError, match=r"must be a table, such as \{name: unet\}; got None"):
        resolve_config(file, [], {})
