"""The RetinaNet's losses and matchers: against torchvision, against formulas, and by learning."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning_support import learn_by_heart, two_lesions
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetHead,
    RetinaNetRegressionHead,
)
from torchvision.ops import (
    box_iou,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)
from torchvision_support import resnet18_fpn, seen_by, shake

from medvision.models.anchors import level_anchors
from medvision.models.box_coder import decode_boxes
from medvision.models.box_losses import diou_loss, giou_loss, paired_iou, smooth_l1_loss
from medvision.models.choices import BOX_LOSSES, HEADS, LESION_LOSSES, MATCHERS, find_choice
from medvision.models.config import RetinaNetConfig
from medvision.models.criterion import Criterion, Target
from medvision.models.heads import SeparateTowers
from medvision.models.lesion_losses import (
    balanced_cross_entropy,
    focal_loss,
    focus,
    hard_negative_loss,
    varifocal_loss,
)
from medvision.models.matcher import BACKGROUND, IGNORED, by_atss, match_iou
from medvision.models.retinanet import RawDetections, build_retinanet

SIZES = (((4.0, 4.0), (6.0, 7.0)), ((9.0, 9.0), (13.0, 12.0)), ((20.0, 18.0), (30.0, 33.0)))
CONFIG = RetinaNetConfig(width=8, pyramid_channels=16, anchor_sizes=SIZES)
COMBINATIONS = list(itertools.product(LESION_LOSSES, BOX_LOSSES, MATCHERS))


def with_options(**options: object) -> RetinaNetConfig:
    return RetinaNetConfig.model_validate({**CONFIG.model_dump(), **options})


def anchors_of(size: int = 64) -> list[Tensor]:
    return [
        level_anchors((size // stride, size // stride), stride, torch.tensor(shapes))
        for stride, shapes in zip((4, 8, 16), SIZES, strict=True)
    ]


def random_boxes(count: int, seed: int, size: float = 64, largest: float = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sides = 2 + torch.rand(count, 2, generator=generator) * (largest - 2)
    corner = torch.rand(count, 2, generator=generator) * (size - sides)
    return torch.cat((corner, corner + sides), dim=1)


def target_of(boxes: list[list[float]], labels: list[int]) -> Target:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "ignored": torch.zeros(0, 4),
    }


# --- the head and the whole network against torchvision's ---------------------------------------


def randomise(module: nn.Module) -> None:
    """Give every bias and running statistic a value of its own, and weights that keep the scale."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_normal_(part.weight)
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.1)
    shake(module)


def copy_tower(ours: Any, theirs: Any) -> None:
    """Copy torchvision's tower of 4; its one norm for all levels becomes ours of each level."""
    for index, block in enumerate(theirs.conv):
        ours.convolutions[index].load_state_dict(block[0].state_dict())
        for norms in ours.norms:
            norms[index].load_state_dict(block[1].state_dict())


def torchvision_heads(channels: int, shapes: int, classes: int) -> tuple[nn.Module, ...]:
    lesion = RetinaNetClassificationHead(channels, shapes, 1, norm_layer=nn.BatchNorm2d)
    category = RetinaNetClassificationHead(channels, shapes, classes, norm_layer=nn.BatchNorm2d)
    box = RetinaNetRegressionHead(channels, shapes, norm_layer=nn.BatchNorm2d)
    for part in (lesion, category, box):
        randomise(part)
    category.conv.load_state_dict(lesion.conv.state_dict())  # one tower judges both
    return lesion.eval(), category.eval(), box.eval()


def copy_head(ours: SeparateTowers, lesion: Any, category: Any, box: Any) -> None:
    copy_tower(ours.class_tower, lesion)
    copy_tower(ours.box_tower, box)
    ours.lesion.load_state_dict(lesion.cls_logits.state_dict())
    ours.category.load_state_dict(category.cls_logits.state_dict())
    ours.box.load_state_dict(box.bbox_reg.state_dict())


def test_raw_outputs_equal_torchvisions_heads_with_the_same_weights() -> None:
    torch.manual_seed(0)
    network = build_retinanet(with_options(head_depth=4), 3, 3).eval()
    randomise(network.pyramid)
    heads = torchvision_heads(16, 2, 3)
    copy_head(network.head, *heads)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        raw = network(images)
        levels = network.pyramid_levels(network.backbone(network.windows(images)))
        lesion, category, deltas = (head(levels) for head in heads)
    torch.testing.assert_close(raw.lesion_logits, lesion[..., 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(raw.class_logits, category, atol=1e-4, rtol=1e-4)
    assert raw.deltas is not None
    torch.testing.assert_close(raw.deltas, deltas, atol=1e-4, rtol=1e-4)
    assert deltas.abs().max() > 0.1
    decoded = BoxCoder((1, 1, 1, 1), bbox_xform_clip=math.log(16)).decode(
        deltas.reshape(-1, 4), [torch.cat(raw.anchors)] * 2
    )
    torch.testing.assert_close(raw.boxes.reshape(-1, 4), decoded[:, 0], atol=1e-3, rtol=1e-4)


def test_the_whole_network_equals_torchvisions_retinanet_from_pixels_to_raw_outputs() -> None:
    torch.manual_seed(0)
    sizes = (*SIZES, ((40.0, 40.0), (50.0, 45.0)))
    options = {"backbone": "resnet18", "stem_pooling": True, "inner_windows": (), "head_depth": 4}
    config = RetinaNetConfig.model_validate(
        {**options, "pyramid_channels": 16, "anchor_sizes": sizes}
    )
    network = build_retinanet(config, 3, 3).eval()
    shake(network.backbone)
    lesion, category, box = torchvision_heads(16, 2, 3)
    copy_head(network.head, lesion, category, box)
    anchors = AnchorGenerator(((8, 16),) * 4, ((1.0,),) * 4)
    head = RetinaNetHead(16, 2, 1, norm_layer=nn.BatchNorm2d)
    head.classification_head, head.regression_head = lesion, box
    theirs = TorchvisionRetinaNet(resnet18_fpn(network, 16), 1, anchor_generator=anchors, head=head)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        raw = network(images)
        levels = list(theirs.eval().backbone(seen_by(network, images)).values())
        expected = theirs.head(levels)
        classes = category(levels)
    torch.testing.assert_close(
        raw.lesion_logits, expected["cls_logits"][..., 0], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(raw.deltas, expected["bbox_regression"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(raw.class_logits, classes, atol=1e-4, rtol=1e-4)
    assert expected["cls_logits"].std() > 0.1


# --- losses ------------------------------------------------------------------------------------


def test_balanced_cross_entropy_is_torchvisions_focal_loss_without_focus() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(300), (torch.rand(300) > 0.9).float()
    expected = sigmoid_focal_loss(logits, targets, 0.75, 0.0, reduction="sum")
    torch.testing.assert_close(balanced_cross_entropy(logits, targets, 0.75), expected)
    # -0.75 log(0.5) - 0.25 log(0.5) = log 2.
    by_hand = balanced_cross_entropy(torch.zeros(2), torch.tensor([0.0, 1.0]), 0.75)
    assert by_hand.item() == pytest.approx(math.log(2))


def test_hard_negatives_by_hand() -> None:
    logits = torch.tensor([[2.0, 3.0, -1.0, 0.5, 9.0, 1.0], [0.0, -3.0, 1.0, 2.0, -1.0, 4.0]])
    positive = torch.tensor([[True, False, False, False, False, False], [False] * 6])
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[0, 4] = False  # the worst of all is to be ignored
    loss = hard_negative_loss(logits, positive, counted, 2)
    softplus = [math.log1p(math.exp(value)) for value in (-2.0, 3.0, 1.0, 4.0, 2.0)]
    assert loss.item() == pytest.approx(sum(softplus), rel=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 6))
def test_hard_negatives_are_the_worst_ones_and_as_many_as_asked_for(
    seed: int, ratio: int, positives: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 40, generator=generator).requires_grad_()
    positive = torch.zeros(3, 40, dtype=torch.bool)
    positive[1, :positives] = True
    counted = positive | (torch.rand(3, 40, generator=generator) > 0.2)
    hard_negative_loss(logits, positive, counted, ratio).backward()
    assert logits.grad is not None
    kept = (logits.grad != 0) & ~positive
    negative = counted & ~positive
    for row, found in enumerate(kept):
        wanted = ratio * max(1, int(positive[row].sum()))
        assert int(found.sum()) == min(wanted, int(negative[row].sum()))
        left = negative[row] & ~found
        assert not left.any() or logits[row][found].min() >= logits[row][left].max()
    assert (logits.grad[positive] < 0).all()
    assert not logits.grad[~counted].any()


def test_varifocal_loss_by_hand() -> None:
    p, q, alpha, gamma = 0.3, 0.8, 0.75, 2.0
    logit = torch.tensor([math.log(p / (1 - p))])
    positive = -q * (q * math.log(p) + (1 - q) * math.log(1 - p))
    negative = -alpha * p**gamma * math.log(1 - p)
    for quality, expected in ((q, positive), (0.0, negative)):
        loss = varifocal_loss(logit, torch.tensor([quality]), alpha, gamma)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_varifocal_loss_is_lowest_where_the_score_is_the_overlap() -> None:
    scores = torch.linspace(0.01, 0.99, 99)
    losses = [varifocal_loss(p.logit()[None], torch.tensor([0.6]), 0.75, 2.0) for p in scores]
    assert scores[int(torch.stack(losses).argmin())].item() == pytest.approx(0.6, abs=1e-6)


SURE = [-110.0, -88.0, -20.0, -17.0, 0.0, 17.0, 20.0, 88.0, 110.0]
"""Logits of answers that are so sure that their probability is rounded to 0, to 1 or to nearly 0."""


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("truth", [0.0, 1.0])
@pytest.mark.parametrize("loss", [focal_loss, varifocal_loss])
def test_sure_answers_have_finite_gradients_for_a_gamma_below_1(
    loss: Any, truth: float, gamma: float
) -> None:
    logits = torch.tensor(SURE, requires_grad=True)
    total = loss(logits, torch.full((len(SURE),), truth), 0.25, gamma)
    total.backward()
    assert torch.isfinite(total)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    # What is wrong is told so however sure it is, and what is right is not told to be less sure.
    towards = logits.grad if truth == 0 else -logits.grad
    assert (towards >= 0).all()
    assert towards[-1 if truth == 0 else 0] > 0.1


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_focal_loss_and_its_gradient_are_torchvisions_for_any_gamma(gamma: float) -> None:
    targets = (torch.arange(300) % 3 == 0).float()
    ours, theirs = (torch.linspace(-9, 9, 300).requires_grad_() for _ in range(2))
    loss = focal_loss(ours, targets, 0.25, gamma)
    expected = sigmoid_focal_loss(theirs, targets, 0.25, gamma, reduction="sum")
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 5.0])
def test_from_a_gamma_of_1_on_the_power_is_the_plain_one_to_the_bit(gamma: float) -> None:
    values = [torch.tensor([0.0, 1e-45, 1e-38, 1e-7, 0.3, 1.0], requires_grad=True) for _ in "ab"]
    powers = (focus(values[0], gamma), values[1].pow(gamma))
    for power in powers:
        power.sum().backward()
    assert torch.equal(*powers)
    assert values[0].grad is not None
    assert values[1].grad is not None
    assert torch.equal(values[0].grad, values[1].grad)


@given(st.integers(0, 10_000))
def test_paired_iou_is_the_diagonal_of_torchvisions(seed: int) -> None:
    first, second = random_boxes(20, seed, largest=60), random_boxes(20, seed + 1, largest=60)
    torch.testing.assert_close(paired_iou(first, second), box_iou(first, second).diagonal())
    point = torch.zeros(1, 4)
    assert paired_iou(point, point).item() == 0


def test_box_losses_by_hand_and_against_torchvision() -> None:
    first, second = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]])
    # IoU 2 / 6; the centres are 1 apart, the hull is 3 x 2 and its diagonal squared 13.
    assert diou_loss(first, second).item() == pytest.approx(1 - 1 / 3 + 1 / 13, rel=1e-5)
    # The hull's 6 pixels are all in the union.
    assert giou_loss(first, second).item() == pytest.approx(1 - 1 / 3, rel=1e-5)
    boxes, others = random_boxes(50, 0), random_boxes(50, 1)
    expected = distance_box_iou_loss(boxes, others, reduction="sum")
    torch.testing.assert_close(diou_loss(boxes, others), expected)
    expected = generalized_box_iou_loss(boxes, others, reduction="sum")
    torch.testing.assert_close(giou_loss(boxes, others), expected)


def test_smooth_l1_by_hand_and_on_torchvisions_deltas() -> None:
    deltas = torch.tensor([[0.05, -0.5, 0.0, 2.0]])
    expected = 0.05**2 / 0.2 + (0.5 - 0.05) + (2 - 0.05)
    loss = smooth_l1_loss(deltas, torch.zeros(1, 4), 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_varifocal_score_is_taught_the_overlap_of_the_predicted_box() -> None:
    config = with_options(lesion_loss="varifocal")
    raw, target = leaf_outputs(), target_of([[10, 20, 18, 29], [40, 40, 52, 50]], [0, 1])
    matched = by_atss(raw.anchors, target["boxes"], config)
    quality = torch.zeros(len(matched))
    for row in torch.where(matched >= 0)[0].tolist():
        box = target["boxes"][matched[row]][None]
        quality[row] = box_iou(raw.boxes[0, row].detach()[None], box)
    expected = varifocal_loss(raw.lesion_logits[0], quality, 0.75, 2.0) / (matched >= 0).sum()
    losses = Criterion(config, torch.ones(2))(raw, [target])
    torch.testing.assert_close(losses["lesion"], expected)
    losses["lesion"].backward()
    assert raw.deltas is not None
    assert raw.deltas.grad is None  # the score learns from the box, not the box from the score


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_the_box_loss_in_use_is_that_of_its_name_on_positives_alone(name: str) -> None:
    config = with_options(box_loss=name, box_weight=2.0, smooth_l1_beta=0.2)
    raw, target = leaf_outputs(), target_of([[10, 20, 18, 29], [40, 40, 52, 50]], [0, 1])
    box = Criterion(config, torch.ones(2))(raw, [target])["box"]
    flat = torch.cat(raw.anchors)
    matched = by_atss(raw.anchors, target["boxes"], config)
    positive = matched >= 0
    truth = target["boxes"][matched[positive]]
    boxes, deltas = raw.boxes[0, positive], raw.deltas
    assert deltas is not None
    wanted = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(truth, flat[positive])
    by_name = {
        "giou": generalized_box_iou_loss(boxes, truth, reduction="sum"),
        "diou": distance_box_iou_loss(boxes, truth, reduction="sum"),
        "smooth-l1": nn.SmoothL1Loss(reduction="sum", beta=0.2)(deltas[0, positive], wanted),
    }
    torch.testing.assert_close(box, 2 * by_name[name] / positive.sum(), rtol=1e-4, atol=1e-5)
    box.backward()
    assert deltas.grad is not None
    assert (deltas.grad[0].abs().sum(dim=1) > 0).equal(positive)


def test_smooth_l1_needs_no_deltas_where_boxes_are_a_mean() -> None:
    config = with_options(box_loss="smooth-l1")
    target = target_of([[10, 20, 18, 29]], [0])
    criterion = Criterion(config, torch.ones(2))
    raw = leaf_outputs()
    with_deltas = criterion(raw, [target])["box"]
    torch.testing.assert_close(criterion(raw._replace(deltas=None), [target])["box"], with_deltas)


# --- matchers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize(("foreground", "background"), [(0.5, 0.4), (0.7, 0.3), (0.5, 0.5)])
def test_iou_matcher_equals_torchvisions(
    foreground: float, background: float, low_quality: bool
) -> None:
    levels = anchors_of()
    flat = torch.cat(levels)
    compared = 0
    for seed in range(40):
        boxes = random_boxes(1 + seed % 6, seed)
        theirs = Matcher(foreground, background, low_quality)(box_iou(boxes, flat))
        if low_quality and len(set(theirs[theirs >= 0].tolist())) < len(boxes):
            continue  # torchvision leaves a box without an anchor; see the next tests
        compared += 1
        assert match_iou(levels, boxes, foreground, background, low_quality).equal(theirs)
    assert compared > 30


def test_iou_matcher_ignores_in_between_and_keeps_the_best_of_a_tiny_lesion() -> None:
    levels = anchors_of()
    tiny = torch.tensor([[31.0, 31.0, 33.0, 33.0], [5.0, 5.0, 25.0, 24.0]])
    overlaps = box_iou(torch.cat(levels), tiny)
    assert overlaps[:, 0].max() < 0.4
    matched = match_iou(levels, tiny, 0.5, 0.4)
    highest, best = overlaps.max(dim=0).values, overlaps.max(dim=1).values
    assert (overlaps[matched == 0, 0] == highest[0]).all()
    others = (overlaps != highest).all(dim=1)
    assert (matched[others & (best < 0.4)] == BACKGROUND).all()
    assert (matched[others & (best >= 0.4) & (best < 0.5)] == IGNORED).all()
    assert (matched[others & (best >= 0.5)] == 1).all()
    assert (match_iou(levels, tiny, 0.5, 0.4, low_quality_matches=False) != 0).all()


def test_lesions_that_share_their_best_anchor_get_one_each() -> None:
    twins = torch.tensor([[20.0, 20.0, 24.0, 24.0]]).repeat(3, 1)
    assert set(range(3)) <= set(match_iou(anchors_of(), twins, 0.5, 0.4).tolist())


def test_the_second_of_two_lesions_gets_the_second_best_anchor_though_it_was_to_be_ignored() -> (
    None
):
    levels = anchors_of()
    twins = torch.tensor([[19.0, 19.5, 25.0, 26.0]]).repeat(2, 1)
    overlap, order = box_iou(torch.cat(levels), twins)[:, 0].sort(descending=True)
    assert 0.9 > overlap[0] > overlap[1] > 0.2
    matched = match_iou(levels, twins, 0.9, 0.1)
    assert matched[order[:3]].tolist() == [0, 1, IGNORED]


def test_a_lesion_that_no_anchor_meets_does_not_claim_all_of_them() -> None:
    nothing = torch.tensor([[30.0, 30.0, 30.0, 30.0]])
    assert int((match_iou(anchors_of(), nothing, 0.5, 0.4) == 0).sum()) == 1
    assert (match_iou(anchors_of(), torch.zeros(0, 4), 0.5, 0.4) == BACKGROUND).all()


def test_thresholds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValidationError, match="bg_iou_thresh must be at most fg_iou_thresh"):
        RetinaNetConfig(fg_iou_thresh=0.3)


# --- all of them together ------------------------------------------------------------------------


def leaf_outputs(images: int = 1) -> RawDetections:
    """Outputs as at the start of a training, that gradients can be asked of."""
    generator = torch.Generator().manual_seed(3)
    levels = anchors_of()
    flat = torch.cat(levels)
    logits = (torch.randn(images, len(flat), generator=generator) * 0.3 - 4.6).requires_grad_()
    classes = torch.zeros(images, len(flat), 2, requires_grad=True)
    deltas = (torch.randn(images, len(flat), 4, generator=generator) * 0.1).requires_grad_()
    return RawDetections(logits, classes, decode_boxes(deltas, flat), levels, deltas)


@pytest.mark.parametrize(("lesion", "box", "matcher"), COMBINATIONS)
def test_healthy_images_only_lower_scores(lesion: str, box: str, matcher: str) -> None:
    config = with_options(lesion_loss=lesion, box_loss=box, matcher=matcher)
    raw = leaf_outputs(images=2)
    losses = Criterion(config, torch.ones(2))(raw, [target_of([], [])] * 2)
    assert losses["box"].item() == losses["class"].item() == 0
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert total > 0
    gradient = raw.lesion_logits.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert (gradient >= 0).all()
    assert (gradient.sum(dim=1) > 0).all()  # a step down this slope lowers scores on each image
    for value in (raw.class_logits.grad, raw.deltas.grad if raw.deltas is not None else None):
        assert value is None or not value.any()


@pytest.mark.parametrize(("lesion", "box", "matcher"), COMBINATIONS)
def test_a_lesion_beside_a_healthy_image_raises_scores_only_there(
    lesion: str, box: str, matcher: str
) -> None:
    config = with_options(lesion_loss=lesion, box_loss=box, matcher=matcher)
    raw = leaf_outputs(images=2)
    target = target_of([[30, 30, 32, 32], [8, 40, 20, 54]], [0, 1])
    losses = Criterion(config, torch.ones(2))(raw, [target, target_of([], [])])
    torch.stack(list(losses.values())).sum().backward()
    gradient = raw.lesion_logits.grad
    assert gradient is not None
    matched = find_choice(MATCHERS, matcher)(raw.anchors, target["boxes"], config)
    assert {0, 1} <= set(matched.tolist())
    assert (gradient[0][matched >= 0] < 0).all()
    assert (gradient[0][matched < 0] >= 0).all()
    assert (gradient[1] >= 0).all()
    assert all(torch.isfinite(value) for value in losses.values())


LEARNT = [
    *((name, "giou", "atss", "separate") for name in LESION_LOSSES),
    ("focal", "diou", "iou", "separate"),
    ("varifocal", "smooth-l1", "iou", "separate"),
    ("focal", "giou", "atss", "shared"),
]


@pytest.mark.parametrize(("lesion", "box", "matcher", "head"), LEARNT)
def test_one_batch_is_learnt_to_near_zero_loss(
    lesion: str, box: str, matcher: str, head: str
) -> None:
    torch.manual_seed(0)
    config = with_options(lesion_loss=lesion, box_loss=box, matcher=matcher, head=head)
    network = build_retinanet(config, 3, 2)
    image, target = two_lesions()
    totals = learn_by_heart(network, Criterion(config, torch.ones(2)), image, target, 120)
    assert totals[-1] < 0.1 < 1 < totals[0], f"{totals[0]:.3f} -> {totals[-1]:.4f}"


# --- the network as a function of the image --------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_predictions_do_not_depend_on_the_rest_of_the_batch(head: str) -> None:
    torch.manual_seed(0)
    network = build_retinanet(with_options(head=head), 3, 2)
    randomise(network)
    network.eval()
    images = torch.rand(4, 3, 48, 64)
    with torch.no_grad():
        together = network(images)
        alone = [network(image[None]) for image in images]
    for name in ("lesion_logits", "class_logits", "boxes", "deltas"):
        parts = torch.cat([getattr(raw, name) for raw in alone])
        torch.testing.assert_close(parts, getattr(together, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_a_shift_by_the_total_stride_shifts_the_outputs(head: str) -> None:
    """Borders are joined, so that nothing enters or leaves and all anchors can be compared."""
    torch.manual_seed(0)
    network = build_retinanet(with_options(head=head), 3, 2).eval()
    for part in network.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1):
            part.padding_mode = "circular"
    for part in (network.head.lesion, network.head.category, network.head.box):
        nn.init.normal_(part.weight, std=0.1)
    images, (down, right) = torch.rand(1, 3, 64, 96), (16, 32)
    with torch.no_grad():
        raw, moved = network(images), network(images.roll((down, right), (2, 3)))
    counts = [len(level) for level in raw.anchors]
    for name in ("lesion_logits", "class_logits", "deltas"):
        whole, shifted = getattr(raw, name), getattr(moved, name)
        assert whole.std() > 1e-3
        for before, after, stride in zip(
            whole.split(counts, dim=1), shifted.split(counts, dim=1), network.strides, strict=True
        ):
            grid = (1, 64 // stride, 96 // stride, -1)
            expected = before.reshape(grid).roll((down // stride, right // stride), (1, 2))
            torch.testing.assert_close(after.reshape(grid), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_at_the_start_every_anchor_is_a_lesion_with_one_percent(head: str) -> None:
    network = build_retinanet(with_options(head=head), 3, 2).eval()
    with torch.no_grad():
        raw = network(torch.zeros(1, 3, 64, 64))
    # Weights of 0.01 on features of about 1 move it by little.
    assert raw.lesion_logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.002)
    bias = network.head.lesion.bias
    assert bias is not None
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.01))
