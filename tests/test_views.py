"""Views of a slice: mirrored boxes lie on the mirrored lesion, and fusing agrees with a sum by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvision.models.mask_head import MaskDetections
from medvision.models.views import fuse_views, mirror_detections

SIZE = (20, 30)


def detections(
    boxes: list[tuple[float, float, float, float]], scores: list[float], masks: bool = False
) -> MaskDetections:
    found: MaskDetections = {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "class_probabilities": torch.tensor([[0.75, 0.25]] * len(scores)).reshape(-1, 2),
    }
    if masks:
        found["masks"] = torch.zeros(len(scores), *SIZE, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(found["masks"], boxes, strict=True):
            mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    return found


FUSING = {"score_thresh": 0.0, "nms_thresh": 0.3, "detections_per_img": 10}


@pytest.mark.parametrize("axes", [(), (-1,), (-2,), (-2, -1)])
def test_a_mirrored_box_lies_on_its_mirrored_mask(axes: tuple[int, ...]) -> None:
    found = detections([(2, 3, 7, 5), (10, 0, 30, 20)], [0.9, 0.4], masks=True)
    mirrored = mirror_detections(found, SIZE, axes)
    for box, mask in zip(mirrored["boxes"].int().tolist(), mirrored["masks"], strict=True):
        x1, y1, x2, y2 = box
        assert mask[y1:y2, x1:x2].all()
        assert mask.sum() == (y2 - y1) * (x2 - x1)
    again = mirror_detections(mirrored, SIZE, axes)
    assert torch.equal(again["boxes"], found["boxes"])
    assert torch.equal(again["masks"], found["masks"])


def test_agreeing_views_are_averaged_by_hand() -> None:
    first = detections([(0, 0, 10, 10)], [0.8])
    second = detections([(2, 0, 12, 10)], [0.4])
    empty = detections([], [])
    fused = fuse_views([first, second, empty, empty], **FUSING)
    assert fused["scores"].tolist() == pytest.approx([(0.8 + 0.4) / 4])
    assert fused["boxes"][0].tolist() == pytest.approx([2 / 3, 0, 10 + 2 / 3, 10])
    assert fused["class_probabilities"][0].tolist() == pytest.approx([0.75, 0.25])


def test_two_boxes_of_one_view_count_once() -> None:
    twice = detections([(0, 0, 10, 10), (1, 0, 11, 10)], [0.8, 0.6])
    fused = fuse_views([twice, detections([], [])], **FUSING)
    assert fused["scores"].tolist() == pytest.approx([0.4])


def test_boxes_apart_stay_apart_and_the_best_come_first() -> None:
    view = detections([(0, 0, 5, 5), (20, 10, 25, 15)], [0.3, 0.9], masks=True)
    fused = fuse_views([view, view], **FUSING)
    assert fused["scores"].tolist() == pytest.approx([0.9, 0.3])
    assert fused["boxes"][0].tolist() == [20, 10, 25, 15]
    assert fused["masks"][0, 10:15, 20:25].all()
    limited = fuse_views([view, view], score_thresh=0.5, nms_thresh=0.3, detections_per_img=10)
    assert len(limited["scores"]) == 1


def test_nothing_found_stays_nothing() -> None:
    fused = fuse_views([detections([], []), detections([], [])], **FUSING)
    assert fused["boxes"].shape == (0, 4)
    assert fused["class_probabilities"].shape == (0, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_one_view_alone_is_only_thinned(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 15
    boxes = torch.cat((corner, corner + 1 + 5 * torch.rand(count, 2, generator=generator)), dim=1)
    scores = torch.rand(count, generator=generator) * 0.9 + 0.05
    found = detections([tuple(box) for box in boxes.tolist()], scores.tolist())  # type: ignore[misc]
    fused = fuse_views([found], **FUSING)
    assert fused["scores"][0] == pytest.approx(float(scores.max()))
    assert 1 <= len(fused["scores"]) <= count
    assert (fused["scores"].diff() <= 1e-6).all()


def test_boxes_apart_stay_apart_even_where_no_overlap_is_asked() -> None:
    one = detections([(0, 0, 10, 10), (15, 0, 25, 10)], [0.8, 0.6])
    fused = fuse_views([one, one], **{**FUSING, "nms_thresh": 0.0})
    assert fused["scores"].tolist() == pytest.approx([0.8, 0.6])
