"""Retina U-Net: a RetinaNet that it does not disturb, and a segmentation that it learns."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from learning_support import learn_by_heart, two_lesions
from torch import nn
from torch.nn import functional
from torchvision.ops import box_iou

from medvision.errors import UsageError
from medvision.models.criterion import Criterion
from medvision.models.flips import detect_with_flips
from medvision.models.retina_unet import (
    RetinaUNet,
    RetinaUNetCriterion,
    SegmentedTarget,
    build_retina_unet,
    cut_masks,
    select_with_masks,
)
from medvision.models.retina_unet_config import RetinaUNetConfig
from medvision.models.retinanet import build_retinanet

SIZES = (((4.0, 4.0), (6.0, 7.0)), ((9.0, 9.0), (13.0, 12.0)), ((20.0, 18.0), (30.0, 33.0)))
CONFIG = RetinaUNetConfig(
    width=8, pyramid_channels=16, segmentation_channels=16, anchor_sizes=SIZES
)


def with_options(**options: object) -> RetinaUNetConfig:
    return RetinaUNetConfig.model_validate({**CONFIG.model_dump(), **options})


def without_map(target: SegmentedTarget) -> SegmentedTarget:
    return {"boxes": target["boxes"], "labels": target["labels"], "ignored": target["ignored"]}


def test_from_one_seed_the_detector_is_the_retinanet() -> None:
    torch.manual_seed(4)
    plain = build_retinanet(CONFIG, 3, 2).eval()
    torch.manual_seed(4)
    network = build_retina_unet(CONFIG, 3, 2).eval()
    images = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        expected, raw = plain(images), network(images)
    for name in ("lesion_logits", "class_logits", "boxes", "deltas"):
        assert getattr(raw, name).equal(getattr(expected, name)), name
    assert expected.segmentation_logits is None
    missing = network.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(name.startswith("segmentation.") for name in missing.missing_keys)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("options", [{}, {"pyramid": "finest-only"}, {"stem_pooling": True}])
def test_every_pixel_gets_a_class(stride: int, options: dict[str, object]) -> None:
    levels = {"finest-only": 1}.get(str(options.get("pyramid")), 3 + len(options))
    sizes = (*SIZES, SIZES[-1])[:levels]
    config = with_options(segmentation_stride=stride, anchor_sizes=sizes, **options)
    network = build_retina_unet(config, 3, 2)
    calls = []
    network.backbone.register_forward_hook(lambda *_: calls.append(1))
    finest = []
    network.segmentation.output.register_forward_hook(lambda *parts: finest.append(parts[2].shape))
    logits = network(torch.rand(2, 3, 64, 96)).segmentation_logits
    assert logits is not None
    assert logits.shape == (2, 3, 64, 96)
    assert finest[0][-2:] == (64 // stride, 96 // stride)
    assert len(calls) == 1
    lesion = 1 - logits.softmax(dim=1)[:, 0]
    assert lesion.mean().item() == pytest.approx(0.01, abs=0.004)


def test_the_configuration_is_read_without_torch() -> None:
    code = "import sys, medvision.models.retina_unet_config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_loss_is_the_mean_of_cross_entropy_and_dice() -> None:
    torch.manual_seed(1)
    network = build_retina_unet(CONFIG, 3, 2)
    image, target = two_lesions()
    target["class_map"][:10] = 255
    raw = network(image)
    assert raw.segmentation_logits is not None
    logits = torch.randn_like(raw.segmentation_logits)
    losses = RetinaUNetCriterion(CONFIG, torch.ones(2))(
        raw._replace(segmentation_logits=logits), [target]
    )
    truth = target["class_map"][None].long()
    entropy = functional.cross_entropy(logits, truth, ignore_index=255)
    chance = logits.softmax(dim=1)[:, :, 10:]
    dice = []
    for number in (1, 2):
        there = (truth[:, 10:] == number).float()
        shared, both = (chance[:, number] * there).sum(), (chance[:, number] + there).sum()
        dice.append((2 * shared / both).item())
    expected = (entropy.item() + 1 - sum(dice) / 2) / 2
    # The Dice has half a pixel added, of some two hundred.
    assert losses["segmentation"].item() == pytest.approx(expected, abs=0.003)
    plain = Criterion(CONFIG, torch.ones(2))(raw, [target])
    assert {name: losses[name] for name in plain} == plain


def test_images_without_masks_train_the_detector_alone() -> None:
    network = build_retina_unet(CONFIG, 3, 2)
    image, target = two_lesions()
    criterion = RetinaUNetCriterion(CONFIG, torch.ones(2))
    raw = network(image.expand(2, -1, -1, -1))
    losses = criterion(raw, [without_map(target)] * 2)
    assert losses["segmentation"].item() == 0
    assert losses["lesion"].item() > 0
    logits = raw.segmentation_logits
    assert logits is not None
    mixed = criterion(raw, [target, without_map(target)])["segmentation"]
    (gradient,) = torch.autograd.grad(mixed, logits)
    assert gradient[0].abs().sum() > 0
    assert not gradient[1].any()
    ignored: SegmentedTarget = {**target, "class_map": torch.full((48, 48), 255, dtype=torch.uint8)}
    assert criterion(raw, [ignored] * 2)["segmentation"].item() == 0


def test_a_healthy_image_has_finite_losses_and_lowers_lesion_pixels() -> None:
    network = build_retina_unet(CONFIG, 3, 2)
    image, target = two_lesions()
    healthy: SegmentedTarget = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "ignored": torch.zeros(0, 4),
        "class_map": torch.zeros_like(target["class_map"]),
    }
    losses = RetinaUNetCriterion(CONFIG, torch.ones(2))(network(image), [healthy])
    torch.stack(list(losses.values())).sum().backward()
    gradients = [value.grad for value in network.parameters() if value.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    bias = network.segmentation.output.bias
    assert bias is not None
    assert bias.grad is not None
    assert bias.grad[0] < 0 < min(bias.grad[1:])


def test_a_network_without_the_branch_is_refused() -> None:
    image, target = two_lesions()
    raw = build_retinanet(CONFIG, 3, 2)(image)
    with pytest.raises(UsageError, match="segmentation branch"):
        RetinaUNetCriterion(CONFIG, torch.ones(2))(raw, [target])


@pytest.mark.parametrize("stride", [1, 2])
def test_boxes_and_masks_of_one_image_are_learnt_by_heart(stride: int) -> None:
    torch.manual_seed(0)
    config = with_options(segmentation_stride=stride)
    network = build_retina_unet(config, 3, 2)
    criterion = RetinaUNetCriterion(config, torch.ones(2))
    image, target = two_lesions()
    totals = learn_by_heart(network, criterion, image, target, 120)
    assert totals[-1] < 0.1 < 1 < totals[0], f"{totals[0]:.3f} -> {totals[-1]:.3f}"
    # In training mode: running statistics lag behind after so few steps.
    with torch.no_grad():
        found = select_with_masks(
            network(image), score_thresh=0.3, nms_thresh=0.3, detections_per_img=10
        )[0]
    assert len(found["masks"]) == 2
    order = box_iou(target["boxes"], found["boxes"]).argmax(dim=1)
    for number, row in enumerate(order.tolist(), start=1):
        truth, mask = target["class_map"] == number, found["masks"][row]
        overlap = (truth & mask).sum() / (truth | mask).sum()
        assert overlap > 0.85, f"{number}: {overlap:.2f}"


def test_masks_are_cut_by_the_box_and_the_segmentation() -> None:
    logits = torch.zeros(3, 8, 10)
    logits[0] = 4.0
    logits[1, 2:5, 3:7] = 8.0  # one class in rows 2..4, columns 3..6
    logits[1:, 6, 8] = 3.5  # two classes share a pixel: neither wins, background does not either
    boxes = torch.tensor(
        [[0.0, 0, 10, 6], [4.5, 2.6, 6.4, 9], [7.2, 5.5, 9.9, 8], [0, 0, 2, 2], [5, 5, 5, 5]]
    )
    masks = cut_masks(logits, boxes)
    expected = torch.zeros(5, 8, 10, dtype=torch.bool)
    expected[0, 2:5, 3:7] = True
    expected[1, 3:5, 4:6] = True
    expected[2, 6, 8] = True
    assert masks.equal(expected)
    assert cut_masks(logits, boxes[:0]).shape == (0, 8, 10)
    assert not cut_masks(logits, boxes, mask_thresh=0.99)[0].any()


def test_a_plain_retinanet_has_boxes_without_masks() -> None:
    raw = build_retinanet(CONFIG, 3, 2)(torch.rand(1, 3, 48, 48))
    (found,) = select_with_masks(raw, score_thresh=0, nms_thresh=0.3, detections_per_img=3)
    assert "masks" not in found
    assert len(found["boxes"]) == 3


def lively(network: RetinaUNet) -> RetinaUNet:
    """Give the norms statistics of their own, and the last layer weights that matter."""
    torch.manual_seed(2)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(part.get_buffer("running_var"), 0.5, 1.5)
    nn.init.normal_(network.segmentation.output.weight, std=0.3)
    return network.eval()


@pytest.mark.parametrize("stride", [1, 2])
def test_the_segmentation_does_not_depend_on_the_rest_of_the_batch(stride: int) -> None:
    network = lively(build_retina_unet(with_options(segmentation_stride=stride), 3, 2))
    images = torch.rand(3, 3, 48, 64)
    with torch.no_grad():
        together = network(images).segmentation_logits
        alone = [network(image[None]).segmentation_logits for image in images]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_shift_by_the_total_stride_shifts_the_segmentation(stride: int) -> None:
    """Borders are joined; only the last enlargement, which cannot be, touches one pixel beside them."""
    network = lively(build_retina_unet(with_options(segmentation_stride=stride), 3, 2))
    for part in network.modules():
        if isinstance(part, nn.Conv2d) and part.kernel_size != (1, 1):
            part.padding_mode = "circular"
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        logits = network(images).segmentation_logits
        moved = network(images.roll((16, 32), (2, 3))).segmentation_logits
    assert logits is not None
    assert moved is not None
    assert logits.std() > 0.1
    expected = logits.roll((16, 32), (2, 3))
    whole = torch.ones(64, 96, dtype=torch.bool)
    for row, column in ((0, 0), (15, 31), (16, 32), (63, 95)):
        whole[row], whole[:, column] = False, False
    torch.testing.assert_close(moved[..., whole], expected[..., whole], atol=1e-5, rtol=1e-4)


def test_bfloat16_gives_float32_logits_close_to_those_of_float32() -> None:
    network = lively(build_retina_unet(CONFIG, 3, 2))
    image, _ = two_lesions()
    with torch.no_grad():
        exact = network(image).segmentation_logits
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(image.to(memory_format=torch.channels_last)).segmentation_logits
    assert exact is not None
    assert rough is not None
    assert rough.dtype == torch.float32
    assert (exact - rough).abs().mean() < 0.05 * exact.std()


def test_the_segmentation_is_averaged_over_mirror_images() -> None:
    network = lively(build_retina_unet(CONFIG, 3, 2))
    images = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        mean = detect_with_flips(network, images).segmentation_logits
        turned = detect_with_flips(network, images.flip((-2, -1))).segmentation_logits
        alone = network(images).segmentation_logits
    assert mean is not None
    assert turned is not None
    torch.testing.assert_close(turned.flip((-2, -1)), mean, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mean, alone)


def test_background_weighs_what_the_settings_say() -> None:
    torch.manual_seed(1)
    network = build_retina_unet(CONFIG, 3, 2)
    image, target = two_lesions()
    raw = network(image)
    assert raw.segmentation_logits is not None
    raw = raw._replace(segmentation_logits=torch.randn_like(raw.segmentation_logits))
    found = []
    for weight in (1.0, 0.0):
        loss = {"dice": 0.0, "cross_entropy": 1.0, "background_weight": weight}
        config = RetinaUNetConfig.model_validate({**CONFIG.model_dump(), "segmentation_loss": loss})
        losses = RetinaUNetCriterion(config, torch.ones(2))(raw, [target])
        found.append(losses["segmentation"].item())
    entropy = functional.cross_entropy(
        raw.segmentation_logits, target["class_map"][None].long(), reduction="none"
    )
    lesions = entropy[target["class_map"][None] > 0]
    assert found[0] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert found[1] == pytest.approx(lesions.mean().item(), rel=1e-4)
