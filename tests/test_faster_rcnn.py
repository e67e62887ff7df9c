"""Faster R-CNN and Mask R-CNN against torchvision's parts, by hand and by what they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models.detection import _utils as reference
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision_support import resnet18_fpn, seen_by, shake

from medvision.errors import UsageError
from medvision.models.deformable_roi import DeformRoIAlign
from medvision.models.faster_rcnn import (
    FasterRCNN,
    FasterRCNNCriterion,
    RawRegions,
    build_faster_rcnn,
)
from medvision.models.mask_head import MaskTarget
from medvision.models.matcher import BACKGROUND, IGNORED
from medvision.models.proposal_training import draw_sample, match_anchors, proposal_losses
from medvision.models.proposals import (
    ProposalRecall,
    RawProposals,
    proposal_recall,
    select_proposals,
)
from medvision.models.region_training import hardest_regions, match_regions, region_class_loss
from medvision.models.roi_levels import RoIAlign
from medvision.models.two_stage_config import (
    FasterRCNNConfig,
    LevelRuleConfig,
    MaskConfig,
    MaskRCNNConfig,
    ProposalConfig,
    RegionConfig,
)
from medvision.training.loop import rate_factor

SIZES = (((4.0, 4.0), (6.0, 7.0)), ((9.0, 9.0), (13.0, 12.0)), ((20.0, 18.0), (30.0, 33.0)))
SMALL: dict[str, Any] = {
    "width": 8,
    "pyramid_channels": 16,
    "anchor_sizes": SIZES,
    "level_rule": LevelRuleConfig(k0=3, canonical_size=10.0),
}
REGIONS = RegionConfig(width=64)
FASTER = FasterRCNNConfig(**SMALL, regions=REGIONS)
MASK = MaskRCNNConfig(**SMALL, regions=REGIONS, mask=MaskConfig(channels=16, depth=2))
KEPT: dict[str, Any] = {"score_thresh": 0.05, "nms_thresh": 0.3, "detections_per_img": 10}
LESIONS = (
    [(0, (20, 26, 30, 38), 0.9), (1, (44, 60, 8, 22), 0.6)],
    [(1, (6, 18, 40, 50), 0.6), (0, (36, 41, 20, 25), 0.9)],
)
"""Class, rows, columns and grey of the lesions of two images."""


def no_target() -> MaskTarget:
    return {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.long),
        "ignored": torch.zeros(0, 4),
        "masks": torch.zeros(0, 64, 64, dtype=torch.bool),
    }


def two_images() -> tuple[torch.Tensor, list[MaskTarget]]:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(2, 3, 64, 64, generator=generator) * 0.2, []
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    for image, lesions in zip(images, LESIONS, strict=True):
        boxes, labels, masks = [], [], []
        for label, (top, bottom, left, right), grey in lesions:
            half = ((bottom - top) / 2, (right - left) / 2)
            row, column = (y - top - half[0]) / half[0], (x - left - half[1]) / half[1]
            mask = row**2 + column**2 < 1
            image[:, mask] = grey
            boxes.append([left, top, right, bottom])
            labels.append(label)
            masks.append(mask)
        targets.append(
            MaskTarget(
                boxes=torch.tensor(boxes, dtype=torch.float32),
                labels=torch.tensor(labels),
                ignored=torch.zeros(0, 4),
                masks=torch.stack(masks),
            )
        )
    return images, targets


def copy_weights(ours: nn.Module, *theirs: nn.Module) -> None:
    """Take torchvision's weights in order; of box corrections those of the first class."""
    values = [value for part in theirs for value in part.state_dict().values()]
    own = ours.state_dict()
    assert len(own) == len(values)
    pairs = zip(own.items(), values, strict=True)
    ours.load_state_dict(
        {
            name: given if given.shape == value.shape else given[4:8]
            for (name, value), given in pairs
        }
    )


class OurAnchors(nn.Module):
    """Stands in for torchvision's anchors, which are centred on cells' corners."""

    def __init__(self, anchors: list[torch.Tensor]) -> None:
        super().__init__()
        self.anchors = torch.cat(anchors)

    def forward(self, images: ImageList, _: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.anchors for _ in images.image_sizes]


def torchvisions_parts(network: FasterRCNN, raw: RawRegions) -> tuple[Any, RoIHeads]:
    """Build torchvision's two stages for one class; give the network their weights."""
    torch.manual_seed(3)
    head = RPNHead(16, 2)
    nn.init.normal_(head.cls_logits.weight, std=0.3)
    nn.init.normal_(head.bbox_pred.weight, std=0.05)
    settings = network.config.proposals
    most = {"training": settings.post_nms_top_n, "testing": settings.post_nms_top_n}
    before = {"training": settings.pre_nms_top_n, "testing": settings.pre_nms_top_n}
    rpn = RegionProposalNetwork(
        OurAnchors(raw.proposals.anchors), head, 0.7, 0.3, 256, 0.5, before, most, 0.7
    )
    names, rule = ["0", "1", "2"], {"canonical_scale": 10, "canonical_level": 3}
    body, predictor = TwoMLPHead(16 * 49, 64), FastRCNNPredictor(64, 2)
    mask_body, mask_predictor = MaskRCNNHeads(16, [16] * 2, 1), MaskRCNNPredictor(16, 16, 2)
    pool = MultiScaleRoIAlign(names, 7, 2, **rule)
    mask_pool = MultiScaleRoIAlign(names, 14, 2, **rule)
    roi_heads = RoIHeads(
        pool, body, predictor, 0.5, 0.5, 64, 0.25, None, 0.05, 0.3, 10,
        mask_pool, mask_body, mask_predictor,
    )  # fmt: skip
    copy_weights(network.proposal_head, head)
    copy_weights(network.box_head, body, predictor)
    assert network.mask_branch is not None
    mask_weights = [*mask_body.state_dict().values(), *mask_predictor.state_dict().values()]
    own = network.mask_branch.head.state_dict()
    # Background has a mask there, too; ours has the one of the first class.
    network.mask_branch.head.load_state_dict(
        {
            name: given if given.shape == value.shape else given[1:2]
            for (name, value), given in zip(own.items(), mask_weights, strict=True)
        }
    )
    network.box_pool.pool = RoIAlign(7, 2, aligned=False)
    network.mask_branch.pool.pool = RoIAlign(14, 2, aligned=False)
    return rpn.eval(), roi_heads.eval()


@torch.no_grad()
def test_both_stages_equal_torchvisions_with_its_weights() -> None:
    torch.manual_seed(0)
    network = build_faster_rcnn(MASK, 3, 1).eval()
    images = torch.rand(2, 3, 64, 96)
    rpn, roi_heads = torchvisions_parts(network, network(images))
    raw = network(images)
    maps = {str(index): level for index, level in enumerate(raw.levels)}
    sizes = [(64, 96)] * 2
    logits, deltas = concat_box_prediction_layers(*rpn.head(raw.levels))
    torch.testing.assert_close(raw.proposals.objectness.reshape(-1, 1), logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(raw.proposals.deltas.reshape(-1, 4), deltas, atol=1e-4, rtol=0)
    proposals, _ = rpn(ImageList(images, sizes), maps)
    for ours, theirs in zip(raw.regions, proposals, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    pooled = roi_heads.box_head(roi_heads.box_roi_pool(maps, proposals, sizes))
    logits, deltas = roi_heads.box_predictor(pooled)
    torch.testing.assert_close(raw.logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(raw.deltas, deltas[:, 4:], atol=1e-4, rtol=0)
    found = network.select(raw, **KEPT)
    expected, _ = roi_heads(maps, proposals, sizes)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["scores"]) > 0
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-4, rtol=0)
    assert network.mask_branch is not None
    branch = network.mask_branch
    masks = branch.head(branch.pool(raw.levels, [item["boxes"] for item in found])).sigmoid()
    theirs = torch.cat([item["masks"] for item in expected])
    torch.testing.assert_close(masks, theirs, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_whole_network_equals_torchvisions_faster_rcnn_from_pixels_to_detections() -> None:
    torch.manual_seed(0)
    options = {"backbone": "resnet18", "stem_pooling": True, "inner_windows": ()}
    sizes = (*SIZES, ((40.0, 40.0), (50.0, 45.0)))
    rule = LevelRuleConfig(k0=3, canonical_size=10.0)
    config = FasterRCNNConfig.model_validate(
        {
            **options,
            "pyramid_channels": 16,
            "anchor_sizes": sizes,
            "level_rule": rule,
            "regions": REGIONS,
        }
    )
    network = build_faster_rcnn(config, 3, 1).eval()
    shake(network.backbone)
    network.box_pool.pool = RoIAlign(7, 2, aligned=False)
    head, body, predictor = RPNHead(16, 2), TwoMLPHead(16 * 49, 64), FastRCNNPredictor(64, 2)
    nn.init.normal_(head.cls_logits.weight, std=0.3)
    nn.init.normal_(head.bbox_pred.weight, std=0.05)
    copy_weights(network.proposal_head, head)
    copy_weights(network.box_head, body, predictor)
    images = torch.rand(2, 3, 64, 96)
    settings = config.proposals
    theirs = TorchvisionFasterRCNN(
        resnet18_fpn(network, 16),
        rpn_anchor_generator=AnchorGenerator(((8, 16),) * 4, ((1.0,),) * 4),
        rpn_head=head,
        rpn_pre_nms_top_n_test=settings.pre_nms_top_n,
        rpn_post_nms_top_n_test=settings.post_nms_top_n,
        rpn_nms_thresh=settings.nms_thresh,
        box_roi_pool=MultiScaleRoIAlign(
            ["0", "1", "2", "3"], 7, 2, canonical_scale=10, canonical_level=3
        ),
        box_head=body,
        box_predictor=predictor,
        box_score_thresh=KEPT["score_thresh"],
        box_nms_thresh=KEPT["nms_thresh"],
        box_detections_per_img=KEPT["detections_per_img"],
        # The images are neither resized nor normalised: ours come in -1..1 already.
        min_size=64,
        max_size=96,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    ).eval()
    theirs.rpn.anchor_generator = OurAnchors(network(images).proposals.anchors)
    expected = theirs(list(seen_by(network, images)))
    found = network.select(network(images), **KEPT)
    for ours, other in zip(found, expected, strict=True):
        assert len(ours["scores"]) > 3
        torch.testing.assert_close(ours["scores"], other["scores"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours["boxes"], other["boxes"], atol=1e-3, rtol=1e-4)


def test_region_losses_equal_torchvisions() -> None:
    images, targets = two_images()
    torch.manual_seed(0)
    network = build_faster_rcnn(FASTER, 3, 2)
    raw = network(images, targets)
    assert raw.matches is not None
    losses = FasterRCNNCriterion(FASTER, torch.ones(2))(raw, targets)
    coder = reference.BoxCoder((10.0, 10.0, 5.0, 5.0))
    labels, wanted = [], []
    for boxes, row, target in zip(raw.regions, raw.matches.regions, targets, strict=True):
        labels.append(torch.where(row >= 0, 1 + target["labels"][row.clamp(min=0)], 0))
        wanted.append(coder.encode_single(target["boxes"][row.clamp(min=0)], boxes))
    category, box = fastrcnn_loss(raw.logits, raw.deltas.repeat(1, 3), labels, wanted)
    torch.testing.assert_close(losses["class"], category)
    torch.testing.assert_close(losses["box"], box)


def test_proposal_losses_are_torchvisions_but_for_what_the_box_loss_is_divided_by() -> None:
    """By the lesions' anchors here, by all that were drawn there; Ren et al.: by all places, times 10."""
    images, targets = two_images()
    settings = ProposalConfig(loss="sampled", matcher="iou", anchors_sampled=64, box_weight=2.0)
    config = FasterRCNNConfig(**SMALL, regions=REGIONS, proposals=settings)
    torch.manual_seed(0)
    raw = build_faster_rcnn(config, 3, 2)(images, targets)
    assert raw.matches is not None
    matched, anchors = raw.matches.anchors, torch.cat(raw.proposals.anchors)
    objectness, deltas = torch.randn(matched.shape), torch.randn(*matched.shape, 4) / 3
    proposals = raw.proposals._replace(objectness=objectness, deltas=deltas)
    losses = proposal_losses(proposals, matched, targets, settings)
    coder = reference.BoxCoder((1.0, 1.0, 1.0, 1.0))
    labels, wanted = [], []
    for row, target in zip(matched, targets, strict=True):
        labels.append(torch.where(row == IGNORED, -1.0, (row >= 0).float()))
        wanted.append(coder.encode_single(target["boxes"][row.clamp(min=0)], anchors))
    counts = {"training": 1, "testing": 1}
    # All that our sample holds is no more than theirs may: they draw it all.
    rpn = RegionProposalNetwork(
        OurAnchors([anchors]), RPNHead(16, 2), 0.7, 0.3, 64, 0.5, counts, counts, 0.7
    )
    expected, box = rpn.compute_loss(
        objectness.reshape(-1, 1), deltas.reshape(-1, 4), labels, wanted
    )
    torch.testing.assert_close(losses["objectness"], expected)
    positives, drawn = int((matched >= 0).sum()), int((matched != IGNORED).sum())
    assert 0 < positives < drawn == 128
    torch.testing.assert_close(losses["proposal_box"], 2.0 * box * drawn / positives)


def test_proposals_are_freed_of_copies_level_by_level_and_of_broken_boxes() -> None:
    """Two copies on one level, one more on the next, one broken, one off the image, one over its edge."""
    first = torch.tensor([[10.0, 10, 20, 20], [10, 10, 20, 21], [10, 10, 20, 20], [70, 5, 80, 9]])
    second = torch.tensor([[10.0, 10, 20, 20], [60, 60, 70, 70]])
    logits = torch.tensor([[1.0, 3.0, 5.0, 4.0, 2.0, 0.0]])
    deltas = torch.zeros(1, 6, 4)
    deltas[0, 2, 0] = float("nan")
    raw = RawProposals(logits, deltas, [first, second])
    found = select_proposals(raw, (64, 64), ProposalConfig(nms_thresh=0.7), 10)[0]
    edge = torch.tensor([60.0, 60.0, 64.0, 64.0])
    torch.testing.assert_close(found, torch.stack((first[1], second[0], edge)))
    assert len(select_proposals(raw, (64, 64), ProposalConfig(pre_nms_top_n=3), 1)[0]) == 1


def test_regions_between_the_thresholds_are_drawn_for_nothing() -> None:
    """IoU 1 and 0.5 stand for the lesion, 0.45 is left out, 0.35 and none are background."""
    target = no_target()
    target["boxes"] = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    sides = [10.0, 5.0, 4.5, 3.5]
    boxes = torch.tensor([[0.0, 0, 10, side] for side in sides] + [[50.0, 50, 60, 60]])
    drawn = torch.Generator().manual_seed(0)
    config = RegionConfig(positive_share=1.0)
    chosen, matched = match_regions(boxes, target, config, drawn)
    assert dict(zip(chosen.tolist(), matched.tolist(), strict=True)) == {
        0: 0, 1: 0, 3: BACKGROUND, 4: BACKGROUND,
    }  # fmt: skip
    everything, _ = match_regions(boxes, target, RegionConfig(sampling="ohem"), drawn)
    assert everything.tolist() == [0, 1, 3, 4]


def test_the_sample_holds_no_more_lesions_than_its_share() -> None:
    matched = torch.tensor([0] * 30 + [IGNORED] * 20 + [BACKGROUND] * 100)
    drawn = draw_sample(matched, 40, 0.25, torch.Generator().manual_seed(0))
    assert len(drawn) == len(drawn.unique()) == 40
    assert (matched[drawn] == 0).sum() == 10
    assert not (matched[drawn] == IGNORED).any()
    few = draw_sample(matched[29:55], 40, 0.25, torch.Generator().manual_seed(0))
    assert matched[29:55][few].tolist() == [0] + [BACKGROUND] * 5


def test_sampled_anchors_leave_the_rest_out() -> None:
    config = ProposalConfig(loss="sampled", matcher="iou", anchors_sampled=32)
    network = build_faster_rcnn(FASTER, 3, 2)
    images, targets = two_images()
    anchors = network(images).proposals.anchors
    matched = match_anchors(anchors, targets, config, torch.Generator().manual_seed(0))
    assert ((matched != IGNORED).sum(dim=1) == 32).all()
    assert all(set(row[row >= 0].tolist()) == {0, 1} for row in matched)


def test_hard_examples_are_the_costliest_without_copies() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [20, 20, 30, 30], [40, 40, 50, 50]])
    losses = torch.tensor([3.0, 5.0, 1.0, 2.0, 0.5, 0.1, 0.9, 0.2])
    config = RegionConfig(sampling="ohem", regions_sampled=2)
    assert hardest_regions(losses, [boxes, boxes], config).tolist() == [1, 3, 6, 4]


@pytest.mark.parametrize(("box_weight", "kept"), [(0.0, [1, 2]), (0.05, [1, 2]), (1.0, [0, 1])])
def test_hard_examples_are_those_of_the_weighted_loss_that_is_trained(
    box_weight: float, kept: list[int]
) -> None:
    """Three regions: a lesion's whose class is right and whose box is wrong, and two false alarms."""
    images, targets = two_images()
    images, target = images[:1], targets[0]
    settings = RegionConfig(width=64, sampling="ohem", regions_sampled=2, box_weight=box_weight)
    config = FasterRCNNConfig(**SMALL, regions=settings)
    raw = build_faster_rcnn(config, 3, 2)(images, [target])
    assert raw.matches is not None
    regions = torch.cat((target["boxes"][:1], torch.tensor([[40.0, 40, 50, 50], [2, 2, 12, 12]])))
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, 2.0, 0.0], [0.0, 1.0, 0.0]])
    deltas = torch.zeros(3, 4)
    deltas[0] = 1.0
    category = functional.cross_entropy(logits, torch.tensor([1, 0, 0]), reduction="none")
    # The wanted deltas are 0: each of the four is 1 - beta / 2 off.
    box = torch.tensor([4 * (1 - 1 / 18), 0.0, 0.0])
    assert (category + box)[0] > category[1] > category[2] > category[0] + 0.05 * box[0]
    raw = raw._replace(
        regions=[regions],
        logits=logits,
        deltas=deltas,
        matches=raw.matches._replace(regions=[torch.tensor([0, BACKGROUND, BACKGROUND])]),
    )
    losses = FasterRCNNCriterion(config, torch.ones(2))(raw, [target])
    torch.testing.assert_close(losses["class"], category[kept].mean())
    torch.testing.assert_close(losses["box"], box_weight * box[kept].mean())


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_sure_regions_have_finite_focal_losses_and_gradients(gamma: float) -> None:
    sure = torch.tensor([[side * size, 0.0] for size in (17.0, 20.0, 110.0) for side in (-1, 1)])
    for label in (0, 1):
        logits, labels = sure.clone().requires_grad_(), torch.full((len(sure),), label)
        config = RegionConfig(loss="focal", focal_gamma=gamma)
        loss = region_class_loss(logits, labels, torch.ones(2), config)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        wrong = (sure[:, 0] < 0) == (label == 0)
        assert (logits.grad[wrong].abs() > 0.9).all()


def test_focal_loss_over_classes_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3]]))
    labels, weights = torch.tensor([0, 2]), torch.tensor([1.0, 1.0, 2.0])
    loss = region_class_loss(logits, labels, weights, RegionConfig(loss="focal", focal_gamma=2))
    expected = torch.tensor(
        [0.2**2 * -torch.tensor(0.8).log(), 2 * 0.7**2 * -torch.tensor(0.3).log()]
    )
    torch.testing.assert_close(loss, expected)


def test_proposal_recall_counts_covered_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [30, 30, 36, 36]])
    found = torch.tensor([[0.0, 0, 10, 6], [50, 50, 60, 60]])
    recall = proposal_recall([found, found[:0]], [boxes, boxes[:1]])
    assert recall == ProposalRecall(1, 3)
    assert recall.share == pytest.approx(1 / 3)
    assert proposal_recall([found], [boxes], 0.7).covered == 0
    assert proposal_recall([found], [boxes[:0]]).share is None


VARIANTS = {
    "faster-rcnn": FASTER,
    "mask-rcnn": MASK,
    "as the paper": FasterRCNNConfig(
        **SMALL, regions=REGIONS, proposals=ProposalConfig(loss="sampled", matcher="iou")
    ),
    "deformable, finest level": FasterRCNNConfig(
        **{**SMALL, "anchor_sizes": (SIZES[0] + SIZES[1] + SIZES[2],), "anchors_per_level": 6},
        regions=RegionConfig(width=64, pooling="deformable"),
        pyramid="finest-only",
    ),
    "ohem and focal": FasterRCNNConfig(
        **SMALL, regions=RegionConfig(width=64, sampling="ohem", loss="focal", regions_sampled=32)
    ),
    "ohem and cross-entropy": FasterRCNNConfig(
        **SMALL, regions=RegionConfig(width=64, sampling="ohem", regions_sampled=32)
    ),
    "random and focal": FasterRCNNConfig(
        **SMALL, regions=RegionConfig(width=64, sampling="random", loss="focal")
    ),
    "convolutions look at regions": FasterRCNNConfig(
        **SMALL, regions=RegionConfig(width=64, head="convolutions")
    ),
    "proposals focal and iou": FasterRCNNConfig(
        **SMALL, regions=REGIONS, proposals=ProposalConfig(loss="focal", matcher="iou")
    ),
    "proposals sampled and atss": FasterRCNNConfig(
        **SMALL, regions=REGIONS, proposals=ProposalConfig(loss="sampled", matcher="atss")
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_healthy_batch_has_finite_losses_and_gradients(name: str) -> None:
    config = VARIANTS[name]
    network = build_faster_rcnn(config, 3, 2)
    targets = [no_target(), no_target()]
    losses = FasterRCNNCriterion(config, torch.ones(2))(
        network(torch.rand(2, 3, 64, 64), targets), targets
    )
    assert losses["proposal_box"].item() == losses["box"].item() == 0
    assert losses["objectness"].item() > 0
    assert losses["class"].item() > 0
    assert losses.get("mask", torch.zeros(())).item() == 0
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert gradients["backbone.stem.0.weight"].abs().sum() > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_a_network_can_learn_two_images_by_heart(name: str) -> None:
    images, targets = two_images()
    config = VARIANTS[name]
    torch.manual_seed(0)
    network = build_faster_rcnn(config, 3, 2)
    criterion = FasterRCNNCriterion(config, torch.ones(2))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    steps = 160
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * rate_factor(step / steps, 0.1)
        losses = criterion(network(images, targets), targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
    assert max(loss.item() for loss in losses.values()) < 0.1
    network.eval()
    # Running statistics lag behind after so few steps; the batch's own are the ones trained on.
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.train()
    with torch.no_grad():
        raw = network(images)
        found = network.select(raw, **{**KEPT, "score_thresh": 0.5})
    assert proposal_recall(raw.regions, [target["boxes"] for target in targets]).share == 1
    for item, target in zip(found, targets, strict=True):
        assert len(item["scores"]) == 2
        overlap = box_iou(target["boxes"], item["boxes"])
        assert overlap.max(dim=1).values.min() > 0.7
        best = overlap.argmax(dim=1)
        assert torch.equal(item["class_probabilities"].argmax(dim=1)[best], target["labels"])
        if "masks" in item:
            masks = item["masks"][best]
            shared = (masks & target["masks"]).sum(dim=(1, 2))
            assert (shared / (masks | target["masks"]).sum(dim=(1, 2))).min() > 0.7


def test_deformable_pooling_starts_as_roi_align() -> None:
    torch.manual_seed(0)
    plain = build_faster_rcnn(FASTER, 3, 2).eval()
    settings = RegionConfig(width=64, pooling="deformable")
    moved = build_faster_rcnn(FasterRCNNConfig(**SMALL, regions=settings), 3, 2).eval()
    missing = moved.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["box_pool.pool.fc.weight", "box_pool.pool.fc.bias"]
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(moved(images).logits, plain(images).logits, atol=1e-5, rtol=1e-4)


def test_masks_have_28_cells_a_side_with_the_settings_that_nobody_changed() -> None:
    """14 bins a side and twice as many cells, in training and in use: Mask R-CNN, figure 4."""
    config = MaskRCNNConfig(**SMALL, regions=REGIONS)
    assert config.mask == MaskConfig()
    images, targets = two_images()
    network = build_faster_rcnn(config, 3, 2)
    raw = network(images, targets)
    assert raw.masks is not None
    assert raw.masks.logits.shape[0] > 0
    assert raw.masks.logits.shape[1:] == (1, 28, 28)
    branch = network.mask_branch
    assert branch is not None
    sizes: list[tuple[int, ...]] = []
    branch.pool.register_forward_hook(lambda *given: sizes.append(given[2].shape[1:]))
    branch.head.register_forward_hook(lambda *given: sizes.append(given[2].shape[1:]))
    found = network.eval().select(network(images), **KEPT)
    assert sizes == [(16, 14, 14), (1, 28, 28)]
    assert found[0]["masks"].shape[1:] == (64, 64)


def test_the_backbone_runs_once_for_both_stages() -> None:
    images, targets = two_images()
    network = build_faster_rcnn(MASK, 3, 2)
    calls: list[int] = []
    network.backbone.register_forward_hook(lambda *_: calls.append(1))
    network(images, targets)
    assert len(calls) == 1
    network.eval()
    network.select(network(images), **KEPT)
    assert len(calls) == 2


@torch.no_grad()
def test_an_image_is_judged_alike_in_any_company() -> None:
    torch.manual_seed(0)
    network = build_faster_rcnn(MASK, 3, 2).eval()
    images = torch.rand(3, 3, 64, 64)
    together = network.select(network(images), **KEPT)
    alone = network.select(network(images[1:2]), **KEPT)[0]
    assert len(alone["scores"]) > 0
    for key in ("boxes", "scores", "class_probabilities"):
        torch.testing.assert_close(together[1][key], alone[key], atol=1e-4, rtol=1e-4)
    assert torch.equal(together[1]["masks"], alone["masks"])
    torch.testing.assert_close(
        alone["class_probabilities"].sum(dim=1), torch.ones(len(alone["scores"]))
    )


@torch.no_grad()
def test_a_shift_by_the_coarsest_stride_shifts_what_is_proposed() -> None:
    torch.manual_seed(0)
    network = build_faster_rcnn(FASTER, 1, 1).eval()
    for output in (network.proposal_head.objectness, network.proposal_head.box):
        nn.init.normal_(output.weight)
    image = torch.zeros(1, 1, 256, 320)
    image[:, :, 120:130, 118:131] = 1.0
    raw, moved = network(image), network(image.roll((16, 32), dims=(2, 3)))
    lengths = [len(level) for level in raw.proposals.anchors]
    for name in ("objectness", "deltas"):
        whole, shifted = getattr(raw.proposals, name)[0], getattr(moved.proposals, name)[0]
        for stride, before, after in zip(
            network.strides, whole.split(lengths), shifted.split(lengths), strict=True
        ):
            rows, columns = 256 // stride, 320 // stride
            grid = (rows, columns, 2, -1)
            # Away from the edges, where padding shows.
            y, x = slice(rows // 3, rows // 2), slice(columns // 4, columns // 2)
            down, right = 16 // stride, 32 // stride
            there = slice(y.start + down, y.stop + down), slice(x.start + right, x.stop + right)
            expected = before.reshape(grid)[y, x]
            # From place to place of one anchor shape the outputs differ, or any shift would do.
            assert expected.std(dim=(0, 1)).min() > 1e-3
            torch.testing.assert_close(after.reshape(grid)[there], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["align", "deformable"])
def test_a_shift_by_the_coarsest_stride_shifts_what_is_found(pooling: str) -> None:
    torch.manual_seed(0)
    regions = MASK.regions.model_copy(update={"pooling": pooling})
    network = build_faster_rcnn(MASK.model_copy(update={"regions": regions}), 1, 2).eval()
    nn.init.normal_(network.proposal_head.objectness.weight)
    for part in network.modules():
        if isinstance(part, DeformRoIAlign):
            nn.init.normal_(part.fc.weight, std=0.1)  # bins that do not move are RoIAlign's
    image = torch.zeros(1, 1, 256, 320)
    image[:, :, 120:130, 118:131] = 1.0
    nn.init.normal_(network.mask_branch.head.mask.weight)  # masks of some pixels, not all or none
    kept = {"score_thresh": 0.0, "nms_thresh": 0.5, "detections_per_img": 100}
    before = network.select(network(image), **kept)[0]
    after = network.select(network(image.roll((16, 32), dims=(2, 3))), **kept)[0]
    x1, y1, x2, y2 = before["boxes"].unbind(dim=1)
    # Away from the edges, where padding shows.
    inner = torch.where((x1 > 80) & (x2 < 180) & (y1 > 80) & (y2 < 170))[0]
    assert len(inner) > 3
    shifted = before["boxes"][inner] + torch.tensor([32.0, 16, 32, 16])
    overlap, row = box_iou(shifted, after["boxes"]).max(dim=1)
    assert overlap.min() > 0.999
    torch.testing.assert_close(after["scores"][row], before["scores"][inner], atol=1e-5, rtol=1e-4)
    assert before["scores"][inner].std() > 1e-4
    assert before["masks"][inner].any(dim=(1, 2)).any()
    masks = before["masks"][inner].roll((16, 32), dims=(1, 2))
    assert (masks != after["masks"][row]).float().mean() < 1e-4


def test_draws_follow_the_weights_so_that_a_resumed_run_is_the_same() -> None:
    images, targets = two_images()
    torch.manual_seed(0)
    first = build_faster_rcnn(FASTER, 3, 2)
    first(images, targets)
    second = build_faster_rcnn(FASTER, 3, 2)
    second.load_state_dict(first.state_dict())
    ours, resumed = first(images, targets), second(images, targets)
    assert all(torch.equal(a, b) for a, b in zip(ours.regions, resumed.regions, strict=True))
    again = first(images, targets)
    assert not all(torch.equal(a, b) for a, b in zip(ours.regions, again.regions, strict=True))


def test_ignored_places_are_trained_on_in_neither_stage() -> None:
    images, targets = two_images()
    targets[0]["ignored"] = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    raw = build_faster_rcnn(FASTER, 3, 2)(images, targets)
    assert raw.matches is not None
    assert not (raw.matches.anchors[0] == BACKGROUND).any()
    assert (raw.matches.regions[0] >= 0).all()
    assert (raw.matches.regions[1] == BACKGROUND).any()


def test_broken_pixels_make_a_loss_that_is_not_finite_but_no_crash() -> None:
    images, targets = two_images()
    images[0, 0, 3, 3] = float("nan")
    network = build_faster_rcnn(MASK, 3, 2)
    losses = FasterRCNNCriterion(MASK, torch.ones(2))(network(images, targets), targets)
    assert not torch.isfinite(torch.stack(list(losses.values())).sum())
    assert len(network.eval().select(network(images), **KEPT)) == 2


def test_autocast_changes_little() -> None:
    images, targets = two_images()
    torch.manual_seed(0)
    network = build_faster_rcnn(MASK, 3, 2).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        raw = network(images)
    assert raw.logits.dtype == raw.proposals.objectness.dtype == torch.float32
    assert network.select(raw, **KEPT)[0]["masks"].shape[1:] == (64, 64)
    exact = network(images).proposals.objectness
    torch.testing.assert_close(raw.proposals.objectness, exact, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        raw = network.train()(images, targets)
    losses = FasterRCNNCriterion(MASK, torch.ones(2))(raw, targets)
    assert torch.isfinite(torch.stack(list(losses.values()))).all()


def test_settings_that_cannot_be_are_refused() -> None:
    unfitted = FasterRCNNConfig(anchor_sizes=SIZES)
    with pytest.raises(UsageError, match="level_rule"):
        build_faster_rcnn(unfitted, 3, 2)
    for wrong in (
        {"anchor_sizes": SIZES[:2]},
        {"level_rule": {"k0": 3}},
        {"regions": {"foreground_iou": 0.3, "background_iou": 0.4}},
        {"inner_windows": ((0.5, 0.5),)},
    ):
        with pytest.raises(ValueError, match=r"must|given"):
            FasterRCNNConfig.model_validate(wrong)
    saved = MASK.model_dump_json()
    assert MaskRCNNConfig.model_validate_json(saved) == MASK
    with pytest.raises(ValueError, match="name"):
        FasterRCNNConfig.model_validate_json(saved)
    network = build_faster_rcnn(FASTER, 3, 2)
    with pytest.raises(UsageError, match="targets"):
        FasterRCNNCriterion(FASTER, torch.ones(2))(network(torch.rand(1, 3, 64, 64)), [no_target()])
