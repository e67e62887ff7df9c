"""Segmentation losses and their targets against formulas, torch and torchvision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from medvision.errors import InputError
from medvision.models.choices import SEGMENTATION_LOSSES, find_choice
from medvision.models.segmentation_losses import (
    IGNORED,
    SegmentationTruth,
    focal_loss,
    segmentation_losses,
    tversky_index,
)
from medvision.models.unet import RawSegmentation
from medvision.models.unet_config import SegmentationLossConfig, UNetConfig
from medvision.models.unet_criterion import SegmentationCriterion
from medvision.training import segmentation_target
from medvision.training.segmentation_target import border_weights, make_class_map

NAMES = sorted(SEGMENTATION_LOSSES)
DEFAULT = SegmentationLossConfig()


def some(classes: int = 3, ignored: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1 + classes, 9, 7, generator=generator) * 2
    maps = torch.randint(0, 1 + classes, (2, 9, 7), generator=generator)
    if ignored:
        maps[:, 4:6] = IGNORED
    return logits.requires_grad_(), maps.to(torch.uint8)


def loss(name: str, logits: Tensor, truth: SegmentationTruth) -> Tensor:
    return find_choice(SEGMENTATION_LOSSES, name)(logits, truth, DEFAULT)


def test_the_names_are_those_of_the_settings() -> None:
    everything = SegmentationLossConfig(**dict.fromkeys(NAMES, 1.0))
    assert sorted(everything.weights) == NAMES
    assert segmentation_target.IGNORED == IGNORED


def test_cross_entropy_equals_torchs() -> None:
    logits, maps = some()
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5])
    found = loss("cross_entropy", logits, SegmentationTruth(maps, weights))
    expected = functional.cross_entropy(logits, maps.long(), weights, ignore_index=IGNORED)
    torch.testing.assert_close(found, expected)


def test_focal_loss_of_two_classes_equals_torchvisions() -> None:
    logits, maps = some(classes=1, ignored=False)
    # A softmax over (a, b) is a sigmoid of b - a.
    expected = sigmoid_focal_loss(
        logits[:, 1] - logits[:, 0], maps.float(), alpha=-1, gamma=2.0, reduction="mean"
    )
    torch.testing.assert_close(loss("focal", logits, SegmentationTruth(maps)), expected)


def test_focal_loss_with_gamma_0_is_cross_entropy() -> None:
    logits, maps = some()
    truth = SegmentationTruth(maps, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    found = focal_loss(logits, truth, SegmentationLossConfig(focal_gamma=0))
    torch.testing.assert_close(found, loss("cross_entropy", logits, truth))


def by_hand() -> tuple[Tensor, SegmentationTruth]:
    """Four pixels with lesion probabilities 0.9, 0.6, 0.2, 0.5; the first two are lesion, the last ignored."""
    probability = torch.tensor([0.9, 0.6, 0.2, 0.5]).reshape(1, 1, 1, 4)
    logits = torch.cat((torch.zeros_like(probability), probability.logit()), dim=1)
    return logits, SegmentationTruth(torch.tensor([[[1, 1, 0, 255]]]))


def test_overlap_losses_by_hand() -> None:
    logits, truth = by_hand()
    # TP = 1.5, FP = 0.2, FN = 0.5; half a pixel above and below.
    dice = 2.0 / (1.5 + 0.5 * 0.2 + 0.5 * 0.5 + 0.5)
    tversky = 2.0 / (1.5 + 0.3 * 0.2 + 0.7 * 0.5 + 0.5)
    assert loss("dice", logits, truth).item() == pytest.approx(1 - dice, abs=1e-6)
    assert loss("tversky", logits, truth).item() == pytest.approx(1 - tversky, abs=1e-6)
    power = loss("focal_tversky", logits, truth).item()
    assert power == pytest.approx((1 - tversky) ** 0.75, abs=1e-6)


def test_dice_is_the_overlap_of_masks_when_probabilities_are_sure() -> None:
    truth = torch.zeros(1, 20, 20, dtype=torch.long)
    truth[:, 5:15, 5:15] = 1
    found = torch.zeros_like(truth)
    found[:, 8:18, 5:15] = 1
    logits = 50.0 * functional.one_hot(found, 2).permute(0, 3, 1, 2)
    # 2 * 70 / (100 + 100), and a pixel added above and below.
    expected = 1 - 141 / 201
    assert loss("dice", logits, SegmentationTruth(truth)).item() == pytest.approx(expected)


def test_missed_pixels_cost_more_than_false_ones() -> None:
    small, large = torch.zeros(1, 8, 8, dtype=torch.long), torch.zeros(1, 8, 8, dtype=torch.long)
    small[:, 2:4], large[:, 2:6] = 1, 1

    def distance(found: Tensor, true: Tensor) -> float:
        logits = 50.0 * functional.one_hot(found, 2).permute(0, 3, 1, 2)
        return loss("tversky", logits, SegmentationTruth(true)).item()

    assert distance(small, large) > distance(large, small) > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case", ["no lesion", "all ignored", "all lesion", "sure and wrong", "sure"]
)
def test_losses_and_gradients_stay_finite(name: str, case: str) -> None:
    logits, maps = some(ignored=False)
    if case in ("no lesion", "all lesion"):
        maps = torch.full_like(maps, 0 if case == "no lesion" else 1)
    if case == "all ignored":
        maps = torch.full_like(maps, IGNORED)
    if case.startswith("sure"):
        right = functional.one_hot(maps.long(), 4).permute(0, 3, 1, 2).float()
        logits = ((right if case == "sure" else -right) * 1e4).requires_grad_()
    found = loss(name, logits, SegmentationTruth(maps, torch.ones(4)))
    assert torch.isfinite(found)
    found.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    if case == "sure":
        assert found.item() < 1e-4
    if case == "all ignored":
        assert not logits.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_and_pixels_of_no_weight_change_nothing(name: str) -> None:
    logits, maps = some()
    truth = SegmentationTruth(maps)
    moved = logits.detach().clone()
    moved[:, :, 4:6] += 7 * torch.randn(2, 4, 2, 7)
    torch.testing.assert_close(loss(name, moved, truth), loss(name, logits, truth))
    weights = (maps != IGNORED).float()
    elsewhere = torch.where(maps == IGNORED, 2, maps)
    weighted = SegmentationTruth(elsewhere, None, weights - 1)
    torch.testing.assert_close(loss(name, moved, weighted), loss(name, logits, truth))
    # What a pixel weighs is relative in the means: all twice as heavy is the same.
    if name in ("cross_entropy", "focal"):
        double = SegmentationTruth(elsewhere, None, 2 * weights - 1)
        torch.testing.assert_close(loss(name, moved, double), loss(name, logits, truth))


@pytest.mark.parametrize("name", NAMES)
def test_a_heavier_pixel_counts_as_much_as_several(name: str) -> None:
    logits, maps = some(ignored=False)
    added = torch.zeros(maps.shape)
    added[:, 0] = 2
    repeated = torch.cat((logits[:, :, :1], logits[:, :, :1], logits), dim=2)
    several = torch.cat((maps[:, :1], maps[:, :1], maps), dim=1)
    torch.testing.assert_close(
        loss(name, logits, SegmentationTruth(maps, None, added)),
        loss(name, repeated, SegmentationTruth(several)),
    )


@pytest.mark.parametrize("name", NAMES)
def test_class_weights_single_out_a_class(name: str) -> None:
    logits, maps = some(ignored=False)
    only = SegmentationTruth(maps, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    found = loss(name, logits, only)
    if name in ("cross_entropy", "focal"):
        others = torch.where(maps == 2, maps, IGNORED)
        torch.testing.assert_close(found, loss(name, logits, SegmentationTruth(others)))
    else:
        costs = (0.5, 0.5) if name == "dice" else (DEFAULT.tversky_alpha, DEFAULT.tversky_beta)
        power = DEFAULT.focal_tversky_power if name == "focal_tversky" else 1
        index = tversky_index(logits, only, *costs)[1]
        torch.testing.assert_close(found, (1 - index) ** power)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 5))
def test_tversky_index_is_a_share(alpha: float, beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 3, 4, 4, generator=generator) * 10
    maps = torch.randint(0, 3, (1, 4, 4), generator=generator)
    index = tversky_index(logits, SegmentationTruth(maps), alpha, beta)
    assert ((index > 0) & (index <= 1 + 1e-6)).all()


def test_sums_are_weighted_and_leave_out_the_rest() -> None:
    logits, maps = some()
    settings = SegmentationLossConfig(dice=0.5, cross_entropy=0, focal=3.0)
    found = segmentation_losses(logits.bfloat16(), SegmentationTruth(maps), settings)
    assert set(found) == {"dice", "focal"}
    rounded = logits.bfloat16().float()
    torch.testing.assert_close(found["dice"], 0.5 * loss("dice", rounded, SegmentationTruth(maps)))
    torch.testing.assert_close(found["focal"], 3 * loss("focal", rounded, SegmentationTruth(maps)))


def test_coarser_outputs_count_by_their_weights() -> None:
    fine, maps = some()
    coarse = torch.randn_like(fine)
    config = UNetConfig(deep_supervision=(0.5,))
    criterion = SegmentationCriterion(config, torch.ones(3))
    targets = [{"class_map": part} for part in maps]
    both = criterion(RawSegmentation(fine, (coarse,)), targets)
    alone = [criterion(RawSegmentation(part, ()), targets) for part in (fine, coarse)]
    for name, value in both.items():
        expected = (alone[0][name] + 0.5 * alone[1][name]) / 1.5
        torch.testing.assert_close(value, expected)


def test_a_larger_target_counts_in_its_middle_and_weights_follow() -> None:
    logits, maps = some()
    wide = torch.full((2, 13, 11), 1, dtype=torch.uint8)
    wide[:, 2:11, 2:9] = maps
    weights = torch.rand(2, 13, 11)
    criterion = SegmentationCriterion(UNetConfig(), torch.tensor([1.0, 2.0, 0.5]))
    raw = RawSegmentation(logits, ())
    large = [
        {"class_map": part, "added_weights": weight}
        for part, weight in zip(wide, weights, strict=True)
    ]
    tight = [
        {"class_map": part, "added_weights": weight[2:11, 2:9]}
        for part, weight in zip(maps, weights, strict=True)
    ]
    for name, value in criterion(raw, large).items():
        torch.testing.assert_close(value, criterion(raw, tight)[name])


def test_class_map_holds_background_classes_and_ignored() -> None:
    labels = np.array([[0, 1, 1], [2, 3, 0]], dtype=np.uint8)
    found = make_class_map(labels, [1, None, 0])
    assert found.dtype == np.uint8
    assert found.tolist() == [[0, 2, 2], [255, 1, 0]]
    assert make_class_map(np.zeros((2, 2), dtype=np.uint8), []).tolist() == [[0, 0], [0, 0]]


def test_class_map_refuses_labels_and_classes_without_a_value() -> None:
    with pytest.raises(InputError, match="label 2 and 1 entries"):
        make_class_map(np.array([[2]]), [0])
    with pytest.raises(InputError, match=r"0\.\.253"):
        make_class_map(np.array([[1]]), [254])
    with pytest.raises(InputError, match=r"0\.\.253"):
        make_class_map(np.array([[1]]), [-1])


def test_border_weights_by_hand() -> None:
    labels = np.zeros((5, 12), dtype=np.uint8)
    labels[:, 2], labels[:, 6] = 1, 2
    weights = border_weights(labels, 10.0, 5.0)
    assert weights[2, 2] == weights[2, 6] == 0
    # Between them: 2 pixels to either. Beyond: 1 to the nearer, 5 to the other.
    assert weights[2, 4] == pytest.approx(10 * math.exp(-(4**2) / 50))
    assert weights[2, 1] == pytest.approx(10 * math.exp(-(6**2) / 50))
    assert weights[0, 11] < 0.3
    assert (border_weights((labels == 1).astype(np.uint8), 10.0, 5.0) == 0).all()
    assert (border_weights(np.zeros((3, 3), dtype=np.uint8), 10.0, 5.0) == 0).all()


def test_what_is_added_to_a_pixel_counts_in_full_whatever_its_class_weighs() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).reshape(1, 1, 1, 3)
    logits = torch.cat((torch.zeros_like(logits), logits), dim=1)
    maps = torch.tensor([[[0, 0, 1]]])
    added = torch.tensor([[[10.0, 0.0, 0.0]]])
    entropy = functional.cross_entropy(logits, maps, reduction="none").flatten().tolist()
    # U-Net's equation 2: the class's weight, 0.05 or 2, plus what the border adds.
    weights = [0.05 + 10, 0.05, 2.0]
    expected = sum(w * e for w, e in zip(weights, entropy, strict=True)) / sum(weights)
    truth = SegmentationTruth(maps, torch.tensor([0.05, 2.0]), added)
    assert loss("cross_entropy", logits, truth).item() == pytest.approx(expected)
    # An overlap knows no class of the background: 1 and what is added.
    lesion = [11 * 0.5, logits[0, 1, 0, 1].sigmoid().item(), logits[0, 1, 0, 2].sigmoid().item()]
    dice = (lesion[2] + 0.5) / (lesion[2] + 0.5 * sum(lesion[:2]) + 0.5 * (1 - lesion[2]) + 0.5)
    assert loss("dice", logits, truth).item() == pytest.approx(1 - dice)
