"""The level rule and the pooling from several levels, against torchvision and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from medvision.models.roi_levels import (
    PAPER_RULE,
    LevelPooling,
    RoIAlign,
    fit_level_rule,
    roi_levels,
)

STRIDES = [4, 8, 16, 32]


def boxes_of_sides(sides: list[float]) -> torch.Tensor:
    return torch.tensor([[10.0, 20.0, 10.0 + side, 20.0 + side] for side in sides])


def random_boxes(count: int, extent: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * extent / 2
    size = 2 + torch.rand(count, 2, generator=generator) ** 3 * extent / 2
    return torch.cat((corner, corner + size), dim=1)


def test_the_papers_examples_by_hand() -> None:
    # 224 is level 4; half of it is level 3; just under stays below; far out is kept among the levels.
    boxes = boxes_of_sides([224.0, 223.0, 112.0, 448.0, 3.0, 5000.0])
    assert roi_levels(boxes, 4, 224.0, [2, 3, 4, 5]).tolist() == [2, 1, 1, 3, 0, 3]


def test_levels_equal_torchvisions_mapper() -> None:
    boxes = random_boxes(500, 1200.0)
    expected = LevelMapper(2, 5, canonical_scale=224, canonical_level=4)([boxes])
    found = roi_levels(boxes, 4, 224.0, [2, 3, 4, 5])
    assert torch.equal(found, expected)
    assert set(found.tolist()) == {0, 1, 2, 3}


def test_pooling_equals_torchvisions_over_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 6, 512 // s, 512 // s, generator=generator) for s in STRIDES]
    boxes = [random_boxes(20, 500.0, 1), random_boxes(7, 500.0, 2)]
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = theirs({str(i): m for i, m in enumerate(maps)}, boxes, [(512, 512)] * 2)
    ours = LevelPooling(STRIDES, 4, 224.0, RoIAlign(7, 2, aligned=False))(maps, boxes)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_aligned_pooling_reads_where_the_cells_are() -> None:
    """On a map that holds each cell's own centre, bins must read their centres in the image."""
    stride, size = 4, 16
    centers = (torch.arange(size) + 0.5) * stride
    features = torch.stack((centers.expand(size, size), centers[:, None].expand(size, size)))[None]
    box = torch.tensor([[13.0, 21.0, 27.0, 35.0]])
    pooled = LevelPooling([stride], 2, 8.0, RoIAlign(7))([features], [box])
    bins = (torch.arange(7) + 0.5) * 2
    torch.testing.assert_close(pooled[0, 0], (13 + bins).expand(7, 7))
    torch.testing.assert_close(pooled[0, 1], (21 + bins)[:, None].expand(7, 7))


def test_no_regions_give_an_empty_pool_and_gradients_flow() -> None:
    maps = [torch.rand(1, 3, 64 // s, 64 // s, requires_grad=True) for s in STRIDES]
    pool = LevelPooling(STRIDES, 4, 32.0, RoIAlign(7))
    assert pool(maps, [torch.zeros(0, 4)]).shape == (0, 3, 7, 7)
    pool(maps, [boxes_of_sides([32.0])]).sum().backward()
    assert [m.grad is not None and bool(m.grad.any()) for m in maps] == [False, False, True, False]


def test_another_pooling_can_stand_in() -> None:
    calls = []

    class Mean(torch.nn.Module):
        def forward(
            self, features: torch.Tensor, rois: torch.Tensor, spatial_scale: float
        ) -> torch.Tensor:
            calls.append((len(rois), spatial_scale))
            return features.new_full((len(rois), features.shape[1], 1, 1), spatial_scale)

    maps = [torch.rand(1, 3, 64 // s, 64 // s) for s in STRIDES]
    pooled = LevelPooling(STRIDES, 4, 32.0, Mean())(maps, [boxes_of_sides([40.0, 8.0, 17.0])])
    torch.testing.assert_close(pooled[:, 0, 0, 0], torch.tensor([1 / 16, 1 / 4, 1 / 8]))
    assert calls == [(1, 1 / 4), (1, 1 / 8), (1, 1 / 16), (0, 1 / 32)]


def test_the_fit_spreads_lesions_over_the_levels() -> None:
    """Sides of 8 to 64 pixels over three octaves: the median must not sit on the finest level."""
    sides = 8 * 2 ** np.linspace(0, 3, 61)
    k0, canonical = fit_level_rule(np.stack((sides * 2, sides / 2), axis=1), [4, 8, 16])
    assert canonical == pytest.approx(np.median(sides), abs=0.01)
    levels = roi_levels(boxes_of_sides(sides.tolist()), k0, canonical, [2, 3, 4])
    # 22.6, the median, is where P2 ends and P3 begins; 45.3 is where P3 ends. Twenty boxes an octave.
    assert np.bincount(levels.numpy(), minlength=3).tolist() == [31, 20, 10]
    # The paper's rule puts every one of them on the finest level.
    assert not roi_levels(boxes_of_sides(sides.tolist()), *PAPER_RULE, [2, 3, 4]).any()


def test_tiny_lesions_stay_on_the_finest_level() -> None:
    sizes = np.array([[3.0, 4.0], [4.0, 4.0], [5.0, 6.0], [6.0, 5.0]])
    assert fit_level_rule(sizes, [4, 8, 16])[0] == 2


def test_without_boxes_the_papers_rule_holds() -> None:
    assert fit_level_rule(np.empty((0, 2)), [4, 8, 16]) == PAPER_RULE


@given(
    sides=st.lists(st.floats(1.0, 300.0), min_size=1, max_size=30),
    zoom=st.sampled_from([2.0, 4.0]),
)
def test_a_fitted_rule_is_a_level_that_exists_and_grows_with_size(
    sides: list[float], zoom: float
) -> None:
    sizes = np.array([[side, side] for side in sides])
    k0, canonical = fit_level_rule(sizes, STRIDES)
    assert k0 in (2, 3, 4, 5)
    small = roi_levels(boxes_of_sides(sides), k0, canonical, [2, 3, 4, 5])
    large = roi_levels(boxes_of_sides([side * zoom for side in sides]), k0, canonical, [2, 3, 4, 5])
    assert (large >= small).all()
