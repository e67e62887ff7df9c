"""The mask head: outputs against torchvision, masks to the grid and back by law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from medvision.models.mask_head import (
    MaskHead,
    MaskTarget,
    RawMasks,
    crop_masks,
    mask_loss,
    masks_to_train,
    paste_masks,
    pick_class,
)


def target(masks: torch.Tensor, boxes: list[list[float]]) -> MaskTarget:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.arange(len(boxes)),
        "ignored": torch.zeros(0, 4),
        "masks": masks,
    }


def test_outputs_equal_torchvisions_with_its_weights() -> None:
    torch.manual_seed(0)
    body, predictor = MaskRCNNHeads(8, [16] * 4, 1), MaskRCNNPredictor(16, 16, 3)
    ours = MaskHead(8, 16, 4, 3)
    theirs = [*body.state_dict().values(), *predictor.state_dict().values()]
    assert len(theirs) == len(ours.state_dict())
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs, strict=True)))
    pooled = torch.randn(5, 8, 14, 14)
    found = ours(pooled)
    assert found.shape == (5, 3, 28, 28)
    torch.testing.assert_close(found, predictor(body(pooled)), atol=1e-4, rtol=1e-4)


def test_one_mask_for_all_classes_or_that_of_the_label() -> None:
    logits = torch.rand(4, 3, 2, 2)
    labels = torch.tensor([2, 0, 1, 1])
    assert torch.equal(pick_class(logits, labels)[0], logits[0, 2])
    assert torch.equal(pick_class(logits[:, :1], labels), logits[:, 0])


@settings(max_examples=30)
@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    top=st.integers(0, 9),
    left=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_masks_come_back_from_the_grid_pixel_by_pixel(
    rows: int, columns: int, top: int, left: int, seed: int
) -> None:
    """Up to half the grid's size nothing may be lost or moved, wherever the box lies."""
    drawn = np.random.default_rng(seed).random((rows, columns)) < 0.6
    mask = torch.zeros(1, 24, 25, dtype=torch.bool)
    mask[0, top : top + rows, left : left + columns] = torch.from_numpy(drawn)
    box = torch.tensor([[left, top, left + columns, top + rows]], dtype=torch.float32)
    cells = crop_masks(mask, torch.zeros(1, dtype=torch.long), box, 28)
    assert torch.equal(paste_masks(cells, box, (24, 25)) >= 0.5, mask)


def test_pasting_keeps_fractions_of_a_pixel() -> None:
    """A full mask in a box of 2.5 to 6.5 covers the four pixels whose centres lie in it, half open."""
    box = torch.tensor([[2.5, 0.4, 6.5, 1.6]])
    pasted = paste_masks(torch.ones(1, 28, 28), box, (4, 9))
    assert torch.equal(torch.where(pasted[0, 0] > 0)[0], torch.tensor([2, 3, 4, 5]))
    assert torch.equal(torch.where(pasted[0].any(dim=1))[0], torch.tensor([0, 1]))
    assert set(pasted.unique().tolist()) == {0.0, 1.0}


def test_pasting_equals_resampling_by_torch_inside_the_box() -> None:
    probabilities = torch.rand(1, 28, 28)
    pasted = paste_masks(probabilities, torch.tensor([[8.0, 16.0, 64.0, 58.0]]), (80, 70))
    expected = functional.interpolate(
        probabilities[None], size=(42, 56), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(pasted[0, 16:58, 8:64], expected[0, 0], atol=1e-5, rtol=1e-5)
    pasted[0, 16:58, 8:64] = 0
    assert not pasted.any()


def test_boxes_over_the_edge_of_the_image_are_cut() -> None:
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([[-3.0, -3.0, 2.0, 30.0]]), (10, 10))
    assert torch.equal(pasted[0] > 0, torch.arange(10).expand(10, 10) < 2)


def test_the_loss_by_hand_and_of_the_right_class() -> None:
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 2:6, 2:6] = True
    mask[1, 7:13, 7:16] = True
    truth = target(mask, [[2.0, 2.0, 6.0, 6.0], [7.0, 7.0, 16.0, 13.0]])
    logits = torch.full((1, 2, 28, 28), -50.0)
    logits[:, 1] = 0.0
    logits[:, 1, :, :14] = 50.0
    # Region 8..12 x 8..12 lies in the second lesion: half its cells are sure and right, half undecided.
    raw = RawMasks(logits, [torch.tensor([[8.0, 8.0, 12.0, 12.0]])], [torch.tensor([1])])
    assert mask_loss(raw, [truth]).item() == pytest.approx(np.log(2) / 2, abs=1e-6)


def test_no_region_gives_no_loss_but_a_gradient() -> None:
    logits = torch.zeros(0, 1, 28, 28, requires_grad=True)
    raw = RawMasks(logits, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.long)])
    loss = mask_loss(raw, [target(torch.zeros(0, 8, 8, dtype=torch.bool), [])])
    loss.backward()
    assert loss.item() == 0


def test_regions_without_outlines_are_left_out() -> None:
    with_masks = target(torch.ones(1, 8, 8, dtype=torch.bool), [[1.0, 1.0, 3.0, 3.0]])
    without: MaskTarget = {
        "boxes": with_masks["boxes"],
        "labels": with_masks["labels"],
        "ignored": with_masks["ignored"],
    }
    boxes, matched = torch.rand(4, 4), torch.tensor([-1, 0, 0, 0])
    kept, rows = masks_to_train([boxes, boxes], [matched, matched], [with_masks, without], 2)
    assert torch.equal(kept[0], boxes[1:3])
    assert rows[0].tolist() == [0, 0]
    assert len(kept[1]) == len(rows[1]) == 0


def test_a_lesion_without_an_outline_takes_none_of_the_others_regions() -> None:
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, 1:3, 1:3] = masks[2, 5:7, 5:7] = True
    image = target(masks, [[1, 1, 3, 3], [3, 3, 5, 5], [5, 5, 7, 7]])
    boxes = torch.rand(6, 4)
    matched = torch.tensor([1, -1, 2, 1, -2, 0])
    kept, rows = masks_to_train([boxes], [matched], [image], 8)
    assert torch.equal(kept[0], boxes[[2, 5]])
    assert rows[0].tolist() == [2, 0]
    assert masks_to_train([boxes], [matched], [image], 1)[1][0].tolist() == [2]
    image["masks"] = masks & False
    assert len(masks_to_train([boxes], [matched], [image], 8)[0][0]) == 0
