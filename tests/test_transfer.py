"""Transfer: what is frozen stays the same to the bit, what learns learns at its own rate."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medvision.errors import UsageError
from medvision.models.backbones import build_backbone
from medvision.models.family import OUTPUTS
from medvision.models.faster_rcnn import FasterRCNN, build_faster_rcnn
from medvision.models.pyramid import FeaturePyramid
from medvision.models.pyramid_config import StageConvolution
from medvision.models.two_stage_config import FasterRCNNConfig, LevelRuleConfig, RegionConfig
from medvision.training.loop import rate_factor, update_average
from medvision.training.transfer import (
    Transfer,
    TransferPlan,
    choose_transfer,
    parameter_groups,
    plan_transfer,
    set_training,
)


class Detector(nn.Module):
    """The parts of a detector by the names that they have in one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_backbone("resnet18-narrow", 2)
        self.pyramid = FeaturePyramid(self.backbone.channels, 8)
        self.head = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack(
            [self.head(level).mean() for level in self.pyramid(self.backbone(images))]
        )


def trained(
    network: nn.Module, plan: TransferPlan, steps: int = 4, rate: float = 0.01, first: int = 0
) -> dict[str, Tensor]:
    """Train as the loop does, from step ``first`` of ``steps``; return the averaged weights."""
    optimizer = torch.optim.AdamW(parameter_groups(network, plan, 0.1), lr=rate)
    average = copy.deepcopy(network)
    for step in range(first, steps):
        progress = step / steps
        set_training(network, plan, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"] * rate_factor(progress, 0.05)
        optimizer.zero_grad(set_to_none=True)
        (network(torch.randn(2, 2, 64, 64)) - 3).square().sum().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        update_average(average, network, 0.9, step)
    return average.state_dict()


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def parts(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("mode", "learning"),
    [
        ("probe", {"head"}),
        ("frozen", {"pyramid", "head"}),
        ("finetune", {"backbone", "pyramid", "head"}),
        ("scratch", {"backbone", "pyramid", "head"}),
    ],
)
def test_what_is_frozen_stays_the_same_to_the_bit(mode: Transfer, learning: set[str]) -> None:
    torch.manual_seed(0)
    network = Detector()
    plan = plan_transfer(network, mode, "")
    before = snapshot(network)
    average = trained(network, plan)
    assert parts(changed(before, network.state_dict())) == learning
    # The averaged weights, which are those that are used, neither.
    assert parts(changed(before, average)) == learning
    statistics = {name for name in before if name.startswith("backbone.") and "running" in name}
    moved = bool(statistics & changed(before, network.state_dict()))
    assert moved == ("backbone" in learning)


def test_probe_can_train_the_last_layer_alone() -> None:
    network = Detector()
    plan = plan_transfer(network, "probe", "", outputs=("head.3",))
    before = snapshot(network)
    trained(network, plan)
    assert changed(before, network.state_dict()) == {"head.3.weight", "head.3.bias"}


def test_the_encoder_joins_in_after_the_warm_up() -> None:
    torch.manual_seed(0)
    network = Detector()
    plan = plan_transfer(network, "finetune", "")
    before = snapshot(network)
    set_training(network, plan, 0.0)
    assert not network.backbone.training
    assert network.head.training
    trained(network, TransferPlan("finetune", "", (), ("backbone",), warmup_share=1.0))
    assert parts(changed(before, network.state_dict())) == {"pyramid", "head"}
    set_training(network, plan, plan.warmup_share)
    assert network.backbone.training
    assert all(value.requires_grad for value in network.parameters())
    before = snapshot(network)
    trained(network, plan, first=2)
    assert "backbone" in parts(changed(before, network.state_dict()))


def test_the_encoder_learns_at_a_tenth_of_the_rate() -> None:
    network = Detector()
    groups = parameter_groups(network, plan_transfer(network, "finetune", ""), 0.1)
    assert [(group["rate"], group["weight_decay"]) for group in groups] == [
        (1.0, 0.1),
        (1.0, 0.0),
        (0.1, 0.1),
        (0.1, 0.0),
    ]
    encoder = {id(value) for value in network.backbone.parameters()}
    for group in groups:
        assert all((id(value) in encoder) == (group["rate"] == 0.1) for value in group["params"])
        assert all((value.ndim > 1) == (group["weight_decay"] > 0) for value in group["params"])


@pytest.mark.parametrize("mode", ["probe", "frozen", "finetune", "scratch"])
def test_each_parameter_is_in_one_group_or_frozen(mode: Transfer) -> None:
    network = Detector()
    plan = plan_transfer(network, mode, "")
    grouped = [id(v) for group in parameter_groups(network, plan, 0.1) for v in group["params"]]
    set_training(network, plan, 1.0)
    learning = [id(value) for value in network.parameters() if value.requires_grad]
    assert sorted(grouped) == sorted(learning)


def test_scratch_has_the_groups_of_plain_training() -> None:
    network = Detector()
    groups = parameter_groups(network, plan_transfer(network, "scratch", ""), 0.02)
    decayed = [id(value) for value in network.parameters() if value.ndim > 1]
    plain = [id(value) for value in network.parameters() if value.ndim <= 1]
    assert [[id(value) for value in group["params"]] for group in groups] == [decayed, plain]


def deformable_detector(convolution: StageConvolution) -> FasterRCNN:
    """A Faster R-CNN of which convolutions and pooling both predict offsets."""
    config = FasterRCNNConfig(
        backbone="resnet18",
        stage_convolution=convolution,
        pyramid_channels=8,
        anchors_per_level=1,
        anchor_sizes=(((4.0, 4.0),), ((9.0, 9.0),), ((20.0, 18.0),)),
        level_rule=LevelRuleConfig(k0=3, canonical_size=10.0),
        regions=RegionConfig(pooling="deformable", width=8),
    )
    return build_faster_rcnn(config, 1, 2)


@pytest.mark.parametrize("convolution", ["deformable", "deformable-v1"])
@pytest.mark.parametrize("mode", ["scratch", "finetune", "frozen", "probe"])
def test_what_predicts_offsets_learns_at_its_own_rate(
    mode: Transfer, convolution: StageConvolution
) -> None:
    """A tenth in a convolution (Zhu et al. 2019), a hundredth in RoI pooling (Dai et al. 2017)."""
    network = deformable_detector(convolution)
    plan = plan_transfer(network, mode, "", outputs=OUTPUTS["faster-rcnn"])
    names = {id(value): name for name, value in network.named_parameters()}
    groups = parameter_groups(network, plan, 0.1)
    found = {names[id(value)]: group["rate"] for group in groups for value in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    offsets = {n for n in names.values() if n.endswith(("offset_weight", "offset_bias"))}
    pooling = {"box_pool.pool.fc.weight", "box_pool.pool.fc.bias"}
    assert len(offsets) == 2 * 12
    encoder = {n for n in names.values() if n.startswith("backbone.")}
    outputs = {n for n in names.values() if n.startswith(OUTPUTS["faster-rcnn"])}
    assert offsets < encoder
    assert pooling < set(names.values()) - encoder - outputs
    learning = {"probe": outputs, "frozen": set(names.values()) - encoder}
    expected = dict.fromkeys(learning.get(mode, names.values()), 1.0)
    for name in expected:
        expected[name] *= 0.1 if name in offsets else 0.01 if name in pooling else 1.0
        expected[name] *= 0.1 if name in encoder and mode == "finetune" else 1.0
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["scratch", "finetune"])
def test_an_offset_moves_by_its_share_of_a_step(mode: Transfer) -> None:
    """One step of AdamW moves every weight that has a gradient by the rate of its group."""
    torch.manual_seed(0)
    network = deformable_detector("deformable")
    plan = plan_transfer(network, mode, "", outputs=OUTPUTS["faster-rcnn"])
    set_training(network, plan, 1.0)
    optimizer = torch.optim.AdamW(parameter_groups(network, plan, 0.0), lr=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["rate"]
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for value in network.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    moved = {
        name: (before[name] - value.detach()).double().mean().item()
        for name, value in network.named_parameters()
    }
    slower = 0.1 if mode == "finetune" else 1.0
    assert moved["box_head.fc6.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["box_pool.pool.fc.weight"] == pytest.approx(1e-5, rel=1e-2)
    assert moved["backbone.layer2.0.conv1.weight"] == pytest.approx(1e-3 * slower, rel=1e-2)
    assert moved["backbone.layer2.0.conv1.offset_weight"] == pytest.approx(1e-4 * slower, rel=1e-2)


def test_auto_says_why() -> None:
    assert choose_transfer("auto", {"a": 9}, pretrained=False) == (
        "scratch",
        "scratch: there are no pretrained weights to start from.",
    )
    mode, why = choose_transfer("auto", {"cyst": 20, "nodule": 4}, pretrained=True)
    assert mode == "frozen"
    assert "24 examples of 2 classes (nodule has 4), 12.0 a class, under 16" in why
    mode, why = choose_transfer("auto", {"cyst": 200, "nodule": 4}, pretrained=True)
    assert mode == "finetune"
    assert "102.0 a class, at least 16" in why
    assert choose_transfer("auto", {}, pretrained=True)[0] == "frozen"
    assert choose_transfer("probe", {"a": 900}, pretrained=True)[0] == "probe"


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 60), min_size=1, max_size=4))
def test_auto_never_goes_back_with_more_examples(examples: dict[str, int]) -> None:
    order = ["frozen", "finetune"]
    mode, why = choose_transfer("auto", examples, pretrained=True)
    assert why.startswith(mode)
    assert (mode == "finetune") == (sum(examples.values()) / len(examples) >= 16)
    more = {name: count + 1 for name, count in examples.items()}
    assert order.index(choose_transfer("auto", more, pretrained=True)[0]) >= order.index(mode)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="needs pretrained weights"):
        choose_transfer("finetune", {"a": 100}, pretrained=False)
    with pytest.raises(UsageError, match="no part 'encoder'"):
        plan_transfer(Detector(), "frozen", "", encoder=("encoder",))
    with pytest.raises(UsageError, match="must be resolved"):
        plan_transfer(Detector(), "auto", "")
