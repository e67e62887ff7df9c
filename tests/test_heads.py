"""Heads of both kinds of detector against torchvision's, with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetRegressionHead,
)
from torchvision_support import shake

from medvision.models.heads import SeparateTowers, SharedTower
from medvision.models.region_heads import ConvolutionHead, LinearHead


def count(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_a_shared_tower_is_torchvisions_heads_with_one_tower_among_them() -> None:
    """Its towers have 4 convolutions, ours as many; its one norm for all levels is ours of each."""
    torch.manual_seed(0)
    lesion = RetinaNetClassificationHead(16, 2, 1, norm_layer=nn.BatchNorm2d)
    category = RetinaNetClassificationHead(16, 2, 3, norm_layer=nn.BatchNorm2d)
    box = RetinaNetRegressionHead(16, 2, norm_layer=nn.BatchNorm2d)
    for part in (lesion, category, box):
        shake(part)
        part.conv.load_state_dict(lesion.conv.state_dict())
        part.eval()
    ours = SharedTower(16, 4, 3, 2, 3).eval()
    for index, block in enumerate(lesion.conv):
        ours.tower.convolutions[index].load_state_dict(block[0].state_dict())
        for norms in ours.tower.norms.children():
            norms[index].load_state_dict(block[1].state_dict())  # type: ignore[index]
    ours.lesion.load_state_dict(lesion.cls_logits.state_dict())
    ours.category.load_state_dict(category.cls_logits.state_dict())
    ours.box.load_state_dict(box.bbox_reg.state_dict())
    levels = [torch.randn(2, 16, size, size + 2) for size in (16, 8, 4)]
    with torch.no_grad():
        outputs = [ours(level, index) for index, level in enumerate(levels)]
        expected = [part(levels) for part in (lesion, category, box)]
    for found, wanted in zip(zip(*outputs, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(found, dim=1), wanted, atol=1e-4, rtol=1e-4)
        assert wanted.std() > 1e-3


def test_a_shared_tower_has_one_tower_less() -> None:
    separate, shared = SeparateTowers(16, 2, 3, 2, 4), SharedTower(16, 2, 3, 2, 4)
    tower = 2 * 16 * 16 * 9 + 3 * 2 * 2 * 16  # convolutions without bias, a norm a level
    outputs = (16 * 9 + 1) * 2 * (1 + 4 + 4)
    assert count(shared) == tower + outputs
    assert count(separate) == 2 * tower + outputs


def test_convolutions_on_a_region_are_torchvisions() -> None:
    torch.manual_seed(0)
    body, predictor = FastRCNNConvFCHead((8, 7, 7), [8] * 4, [32]), FastRCNNPredictor(32, 4)
    for part in [*body.modules(), *predictor.modules()]:
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            nn.init.normal_(part.bias, std=0.1)
    ours = ConvolutionHead(8, 7, 32, 3)
    theirs: list[Tensor] = [*body.state_dict().values(), predictor.cls_score.weight]
    theirs += [
        predictor.cls_score.bias,
        predictor.bbox_pred.weight[4:8],
        predictor.bbox_pred.bias[4:8],
    ]
    own = ours.state_dict()
    assert len(own) == len(theirs)
    ours.load_state_dict(dict(zip(own, theirs, strict=True)))
    pooled = torch.randn(5, 8, 7, 7)
    logits, boxes = predictor(body(pooled))
    found = ours(pooled)
    torch.testing.assert_close(found[0], logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], boxes[:, 4:8], atol=1e-4, rtol=1e-4)


def test_at_the_start_a_region_is_background_with_90_percent() -> None:
    for head in (LinearHead(8, 7, 32, 3), ConvolutionHead(8, 7, 32, 3)):
        logits, deltas = head(torch.zeros(2, 8, 7, 7))
        share = logits.softmax(dim=1)
        torch.testing.assert_close(share[:, 0], torch.full((2,), 0.9))
        torch.testing.assert_close(share[:, 1:], torch.full((2, 3), 0.1 / 3))
        assert (deltas == 0).all()
