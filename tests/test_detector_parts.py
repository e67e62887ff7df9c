"""Anchors, matcher, losses, box coding and post-processing against formulas and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, sigmoid_focal_loss

from medvision.models.anchors import fit_anchor_sizes, level_anchors, shape_iou
from medvision.models.box_coder import decode_boxes, encode_boxes
from medvision.models.box_losses import giou_loss
from medvision.models.config import RetinaNetConfig
from medvision.models.criterion import Criterion, Target
from medvision.models.flips import detect_with_flips
from medvision.models.lesion_losses import focal_loss
from medvision.models.matcher import BACKGROUND, IGNORED, ignore_inside, match_atss
from medvision.models.postprocess import select_detections
from medvision.models.retinanet import (
    InnerWindows,
    RawDetections,
    build_retinanet,
)

SIZES = (((4.0, 4.0), (6.0, 7.0)), ((9.0, 9.0), (13.0, 12.0)), ((20.0, 18.0), (30.0, 33.0)))
CONFIG = RetinaNetConfig(width=8, pyramid_channels=16, anchor_sizes=SIZES)


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 80
    return torch.cat((corner, corner + 2 + torch.rand(count, 2, generator=generator) * 30), dim=1)


def test_box_coding_inverts_and_equals_torchvision() -> None:
    boxes, anchors = random_boxes(50), random_boxes(50, 1)
    deltas = encode_boxes(boxes, anchors)
    torch.testing.assert_close(decode_boxes(deltas, anchors), boxes, atol=1e-4, rtol=1e-5)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors), atol=1e-5, rtol=1e-5)


def test_focal_loss_equals_torchvision() -> None:
    logits = torch.randn(200)
    targets = (torch.rand(200) > 0.9).float()
    expected = sigmoid_focal_loss(logits, targets, 0.25, 2.0, reduction="sum")
    torch.testing.assert_close(focal_loss(logits, targets, 0.25, 2.0), expected)


def test_giou_loss_of_separate_unit_boxes_by_hand() -> None:
    first = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    second = torch.tensor([[2.0, 0.0, 3.0, 1.0]])
    # IoU 0, hull 3, union 2: GIoU = 0 - (3 - 2) / 3.
    assert giou_loss(first, second).item() == pytest.approx(1 + 1 / 3, abs=1e-5)


def test_level_anchors_lie_on_cell_centres_in_row_major_order() -> None:
    anchors = level_anchors((2, 3), 8, torch.tensor([[4.0, 6.0], [10.0, 2.0]]))
    assert anchors.shape == (12, 4)
    torch.testing.assert_close(anchors[0], torch.tensor([2.0, 1.0, 6.0, 7.0]))
    torch.testing.assert_close(anchors[3], torch.tensor([7.0, 3.0, 17.0, 5.0]))
    torch.testing.assert_close(anchors[6], torch.tensor([2.0, 9.0, 6.0, 15.0]))


def test_anchors_find_the_clusters_of_the_data() -> None:
    generator = np.random.default_rng(0)
    centers = np.array([(4, 4), (7, 12), (24, 20)])
    boxes = np.concatenate([center * generator.uniform(0.95, 1.05, (80, 2)) for center in centers])
    fitted = np.array(fit_anchor_sizes(boxes, 3, 1, [4, 8, 16])).reshape(-1, 2)
    np.testing.assert_allclose(fitted, centers, rtol=0.05)
    assert shape_iou(boxes, fitted).max(axis=1).mean() > 0.9


def test_anchors_without_or_with_few_boxes_are_still_complete() -> None:
    for boxes in (np.empty((0, 2)), np.array([[5.0, 4.0]])):
        fitted = fit_anchor_sizes(boxes, 3, 2, [4, 8, 16])
        assert np.array(fitted).shape == (3, 2, 2)
        assert (np.array(fitted) > 0).all()


def anchors_of(size: int = 64) -> list[torch.Tensor]:
    return [
        level_anchors((size // stride, size // stride), stride, torch.tensor(shapes))
        for stride, shapes in zip((4, 8, 16), SIZES, strict=True)
    ]


def test_every_lesion_gets_an_anchor_even_under_a_stride() -> None:
    tiny = torch.tensor([[30.1, 30.1, 31.4, 31.2], [5.0, 5.0, 25.0, 24.0], [40.0, 8.0, 46.0, 15.0]])
    matched = match_atss(anchors_of(), tiny, 9)
    assert set(matched.unique().tolist()) == {BACKGROUND, 0, 1, 2}
    flat = torch.cat(anchors_of())
    overlap = box_iou(flat, tiny)
    for index in (1, 2):
        rows = matched == index
        assert overlap[rows, index].min() > 0.15
        assert overlap[rows, index].max() == overlap[:, index].max()


def test_lesions_with_one_best_anchor_get_one_each() -> None:
    levels = anchors_of()
    twins = torch.tensor([[20.0, 20.0, 24.0, 24.0]]).repeat(3, 1)
    matched = match_atss(levels, twins, 9)
    assert set(range(3)) <= set(matched.tolist())


def test_without_boxes_all_is_background() -> None:
    matched = match_atss(anchors_of(), torch.zeros(0, 4), 9)
    assert (matched == BACKGROUND).all()


def test_ignored_regions_take_background_but_never_a_lesion() -> None:
    boxes = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    flat = torch.cat(anchors_of())
    matched = match_atss(anchors_of(), boxes, 9)
    after = ignore_inside(flat, matched, torch.tensor([[8.0, 8.0, 30.0, 30.0]]))
    assert ((after == 0) == (matched == 0)).all()
    centers = (flat[:, :2] + flat[:, 2:]) / 2
    inside = ((centers >= 8) & (centers < 30)).all(dim=1)
    assert (after[inside] != BACKGROUND).all()
    assert (after[~inside] != IGNORED).all()


def no_target() -> Target:
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "ignored": torch.zeros(0, 4),
    }


def test_a_healthy_batch_has_finite_losses_and_gradients() -> None:
    network = build_retinanet(CONFIG, 5, 3)
    losses = Criterion(CONFIG, torch.ones(3))(network(torch.rand(2, 5, 64, 64)), [no_target()] * 2)
    assert losses["box"].item() == 0
    assert losses["class"].item() == 0
    torch.stack(list(losses.values())).sum().backward()
    gradients = [value.grad for value in network.parameters() if value.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert network.head.lesion.weight.grad is not None
    assert network.head.lesion.weight.grad.abs().sum() > 0


def test_a_network_can_learn_two_lesions_by_heart() -> None:
    torch.manual_seed(0)
    network = build_retinanet(CONFIG, 3, 2)
    image = torch.rand(1, 3, 64, 64) * 0.2
    image[:, :, 20:26, 30:38] = 0.9
    image[:, :, 44:60, 8:22] = 0.6
    target: Target = {
        "boxes": torch.tensor([[30.0, 20.0, 38.0, 26.0], [8.0, 44.0, 22.0, 60.0]]),
        "labels": torch.tensor([0, 1]),
        "ignored": torch.zeros(0, 4),
    }
    criterion = Criterion(CONFIG, torch.ones(2))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(60):
        losses = criterion(network(image), [target])
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    network.eval()
    # Running statistics lag behind after sixty steps; the batch's own are the ones trained on.
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.train()
    with torch.no_grad():
        found = select_detections(
            network(image), score_thresh=0.3, nms_thresh=0.3, detections_per_img=10
        )[0]
    assert len(found["scores"]) == 2
    overlap = box_iou(target["boxes"], found["boxes"])
    assert overlap.max(dim=1).values.min() > 0.6
    classes = found["class_probabilities"].argmax(dim=1)[overlap.argmax(dim=1)]
    assert classes.tolist() == [0, 1]


def test_the_backbone_runs_once_and_strides_are_as_said() -> None:
    network = build_retinanet(CONFIG, 5, 3)
    calls = []
    network.backbone.register_forward_hook(lambda *_: calls.append(1))
    raw = network(torch.rand(1, 5, 64, 96))
    assert len(calls) == 1
    assert network.strides == CONFIG.strides == [4, 8, 16]
    cells = sum((64 // stride) * (96 // stride) for stride in network.strides)
    assert raw.lesion_logits.shape == (1, cells * 2)
    assert raw.class_logits.shape == (1, cells * 2, 3)
    assert raw.boxes.shape == (1, cells * 2, 4)


def test_stem_pooling_leaves_four_levels_from_stride_4() -> None:
    config = RetinaNetConfig(
        width=8, pyramid_channels=16, stem_pooling=True, anchor_sizes=(*SIZES, SIZES[-1])
    )
    network = build_retinanet(config, 3, 1)
    assert network.strides == config.strides == [4, 8, 16, 32]
    assert network(torch.rand(1, 3, 64, 64)).lesion_logits.shape[1] == 2 * (256 + 64 + 16 + 4)


def test_head_outputs_belong_to_their_anchors() -> None:
    """A weight that only sees one cell must move the outputs of that cell's anchors alone."""
    network = build_retinanet(CONFIG, 1, 2).eval()
    level = torch.zeros(1, 16, 4, 5)
    with torch.no_grad():
        base = network.head(level, 0)[2]
        level[0, :, 2, 3] = 50.0
        moved = network.head(level, 0)[2]
    changed = (base - moved).abs().sum(dim=-1).reshape(4, 5, 2)
    assert changed[2, 3].min() > changed.median()


def test_select_keeps_one_of_two_copies_and_respects_the_threshold() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 36, 36], [50, 50, 60, 60]]])
    raw = RawDetections(
        torch.logit(torch.tensor([[0.9, 0.8, 0.5, 0.01]])), torch.zeros(1, 4, 3), boxes, []
    )
    found = select_detections(raw, score_thresh=0.05, nms_thresh=0.3, detections_per_img=10)[0]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.5]))
    torch.testing.assert_close(found["class_probabilities"], torch.full((2, 3), 1 / 3))
    none = select_detections(raw, score_thresh=0.95, nms_thresh=0.3, detections_per_img=10)[0]
    assert none["boxes"].shape == (0, 4)


def test_inner_windows_by_hand() -> None:
    windows = InnerWindows(((0.0, 0.5), (0.25, 0.75)))
    seen = windows(torch.tensor([0.0, 0.25, 0.5, 1.0]).reshape(1, 1, 1, 4))
    expected = [[-1, -0.5, 0, 1], [-1, 0, 1, 1], [-1, -1, 0, 1]]
    torch.testing.assert_close(seen[0, :, 0], torch.tensor(expected, dtype=torch.float32))


def test_mirror_images_are_averaged_in_one_frame() -> None:
    torch.manual_seed(1)
    network = build_retinanet(CONFIG, 3, 2).eval()
    images = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        mean = detect_with_flips(network, images)
        turned = detect_with_flips(network, images.flip((-2, -1)))
    # Four views of the turned slice are the same four pictures, so only the frame differs.
    boxes = turned.boxes[0].clone()
    boxes = torch.stack((64 - boxes[:, 2], 48 - boxes[:, 3], 64 - boxes[:, 0], 48 - boxes[:, 1]), 1)
    for (rows, columns), first in zip(((12, 16), (6, 8), (3, 4)), (0, 384, 480), strict=True):
        cells = torch.arange(rows * columns * 2).reshape(rows, columns, 2) + first
        mirror = cells.flip((0, 1)).flatten()
        torch.testing.assert_close(
            mean.lesion_logits[0, cells.flatten()], turned.lesion_logits[0, mirror]
        )
        torch.testing.assert_close(mean.boxes[0, cells.flatten()], boxes[mirror])
        torch.testing.assert_close(
            mean.class_logits[0, cells.flatten()], turned.class_logits[0, mirror]
        )
