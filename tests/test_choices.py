"""Names in settings: each stands for something, and a new one is a file and a line."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from medvision.models import choices
from medvision.models.choices import find_choice
from medvision.models.config import RetinaNetConfig
from medvision.models.proposal_training import ObjectnessLoss
from medvision.models.region_training import RegionLoss
from medvision.models.two_stage_config import ProposalConfig, RegionConfig

TABLES = {
    "backbone": choices.BACKBONES,
    "head": choices.HEADS,
    "lesion_loss": choices.LESION_LOSSES,
    "box_loss": choices.BOX_LOSSES,
    "matcher": choices.MATCHERS,
}
ARGUMENTS = {"backbone": 3, "head": 5, "lesion_loss": 2, "box_loss": 2, "matcher": 3}

NEW_FILE = '''
"""What somebody else wrote."""

import torch
from torch import nn

from medvision.models.backbone import Backbone
from medvision.models.heads import Head
from medvision.models.matcher import match_iou
from medvision.models.proposal_training import ObjectnessLoss
from medvision.models.region_heads import RegionHead
from medvision.models.region_training import RegionLoss

asked = []


class Tiny(Backbone):
    def __init__(self, name, in_channels, stem_pooling):
        super().__init__()
        self.channels, self.strides = [4, 4, 4, 4], [2, 4, 8, 16]
        widths = [in_channels, 4, 4, 4]
        self.steps = nn.ModuleList(nn.Conv2d(width, 4, 3, 2, 1) for width in widths)

    def forward(self, images):
        maps = []
        for step in self.steps:
            images = step(images)
            maps.append(images)
        return maps


def squares(judged, config):
    asked.append("loss")
    return (judged.logits.sigmoid() - judged.positive.float())[judged.counted].square().sum()


def l1(placed, config):
    asked.append("box")
    return (placed.predicted - placed.target).abs().sum()


def generous(anchors, boxes, config):
    asked.append("matcher")
    return match_iou(anchors, boxes, 0.3, 0.2)


class Direct(Head):
    def __init__(self, channels, depth, levels, shapes, classes):
        super().__init__()
        self.add_outputs(channels, shapes, classes)

    def look(self, features, level):
        asked.append("head")
        return features, features


class Mean(RegionHead):
    def __init__(self, channels, pool_size, width, classes):
        super().__init__()
        self.add_outputs(channels, classes)

    def look(self, pooled):
        asked.append("head")
        return pooled.mean(dim=(2, 3))


def sum_of_errors(logits, wanted, config):
    asked.append("objectness")
    return (logits.sigmoid() - wanted).abs().sum()


def margin(logits, labels, config):
    asked.append("class")
    return 1 - logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]


errors = ObjectnessLoss(sum_of_errors, drawn=False)
wrong = RegionLoss(margin, by_lesions=True)
'''

NEW_LINES = """
from medvision.models import choices

choices.BACKBONES["tiny"] = "somebody_else:Tiny"
choices.LESION_LOSSES["squares"] = "somebody_else:squares"
choices.BOX_LOSSES["l1"] = "somebody_else:l1"
choices.MATCHERS["generous"] = "somebody_else:generous"
choices.HEADS["direct"] = "somebody_else:Direct"
choices.PROPOSAL_MATCHERS["generous"] = "somebody_else:generous"
choices.PROPOSAL_LOSSES["errors"] = "somebody_else:errors"
choices.REGION_HEADS["mean"] = "somebody_else:Mean"
choices.REGION_LOSSES["wrong"] = "somebody_else:wrong"
"""

COMMAND = """
import sys
from medvision.cli.main import main

status = main(sys.argv[1:])
import somebody_else

print(sorted(set(somebody_else.asked)))
sys.exit(status)
"""


@pytest.mark.parametrize(("setting", "name"), [(s, n) for s, t in TABLES.items() for n in t])
def test_every_name_stands_for_something_that_takes_what_it_is_given(
    setting: str, name: str
) -> None:
    found = find_choice(TABLES[setting], name)
    names = inspect.signature(found).parameters
    assert len(names) == ARGUMENTS[setting]
    assert getattr(RetinaNetConfig.model_validate({setting: name}), setting) == name


def test_every_name_of_the_two_stages_stands_for_something() -> None:
    for name in choices.PROPOSAL_MATCHERS:
        found = find_choice(choices.PROPOSAL_MATCHERS, name)
        assert list(inspect.signature(found).parameters) == ["anchors", "boxes", "config"]
        assert ProposalConfig(matcher=name).matcher == name
    for name in choices.PROPOSAL_LOSSES:
        assert isinstance(find_choice(choices.PROPOSAL_LOSSES, name), ObjectnessLoss)
        assert ProposalConfig(loss=name).loss == name
    for name in choices.REGION_LOSSES:
        assert isinstance(find_choice(choices.REGION_LOSSES, name), RegionLoss)
        assert RegionConfig(loss=name).loss == name
    for name in choices.REGION_HEADS:
        head = find_choice(choices.REGION_HEADS, name)(8, 7, 16, 3)
        logits, deltas = head(torch.rand(5, 8, 7, 7))
        assert (logits.shape, deltas.shape) == ((5, 4), (5, 4))
        assert RegionConfig(head=name).head == name


@pytest.mark.parametrize("name", ["resnet18-narrow", "resnet18", "resnet50"])
@pytest.mark.parametrize("pooling", [False, True])
def test_a_backbone_is_what_it_says(name: str, pooling: bool) -> None:
    backbone = find_choice(choices.BACKBONES, name)(name, 4, pooling).eval()
    maps = backbone(torch.rand(1, 4, 64, 96))
    assert [one.shape[1] for one in maps] == backbone.channels
    sizes = [(64 // stride, 96 // stride) for stride in backbone.strides]
    assert [tuple(one.shape[2:]) for one in maps] == sizes
    first = backbone.get_submodule(backbone.first_convolution)
    assert first.in_channels == 4
    assert isinstance(backbone.get_submodule(backbone.first_norm), torch.nn.BatchNorm2d)
    assert all(len(list(backbone.get_submodule(stage))) > 1 for stage in backbone.stage_names)


@pytest.mark.parametrize("setting", ["head", "lesion_loss", "box_loss", "matcher"])
def test_another_name_is_refused_with_those_that_there_are(setting: str) -> None:
    with pytest.raises(ValidationError) as refused:
        RetinaNetConfig.model_validate({setting: "no such"})
    assert all(f"'{name}'" in str(refused.value) for name in TABLES[setting])
    schema = RetinaNetConfig.model_json_schema()["properties"][setting]
    assert schema["enum"] == list(TABLES[setting])


def test_settings_are_read_without_torch() -> None:
    code = "import sys, medvision.models.family_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


ONE_STAGE = {
    "model.lesion_loss": "squares",
    "model.box_loss": "l1",
    "model.matcher": "generous",
    "model.head": "direct",
}
TWO_STAGES = {
    "model.name": "faster-rcnn",
    "model.proposals.matcher": "generous",
    "model.proposals.loss": "errors",
    "model.regions.head": "mean",
    "model.regions.loss": "wrong",
}


@pytest.mark.parametrize(
    ("chosen", "asked"),
    [
        (ONE_STAGE, ["box", "head", "loss", "matcher"]),
        (TWO_STAGES, ["class", "head", "matcher", "objectness"]),
    ],
    ids=["one stage", "two stages"],
)
def test_a_new_backbone_head_loss_and_matcher_are_a_file_and_a_line_each(
    phantom_data: Path, tmp_path: Path, chosen: dict[str, str], asked: list[str]
) -> None:
    (tmp_path / "somebody_else.py").write_text(NEW_FILE)
    settings = {
        **chosen,
        "model.backbone": "tiny",
        "model.pyramid_channels": 8,
        "sampling.crop_size": 32,
        "stack.n_slices": 3,
        "steps": 2,
        "batch_size": 2,
        "validations": 1,
        "device": "cpu",
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-c",
        NEW_LINES + COMMAND,
        "train",
        str(phantom_data),
        "-o",
        str(run),
    ]
    done = subprocess.run(
        [*command, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(asked)
    model = json.loads((run / "detector.json").read_text())["model"]
    assert model["backbone"] == "tiny"
    for name, value in chosen.items():
        part = model
        for key in name.split(".")[1:]:
            part = part[key]
        assert part == value
