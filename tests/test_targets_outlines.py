"""Crops of lesions known by a box alone: the box is in the truth, and no outline that nobody drew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training_support import case_with

from medvision.datasets.discover import LoadedCase
from medvision.geometry import Box
from medvision.labels.annotation import Annotation
from medvision.models.unet import RawSegmentation
from medvision.models.unet_config import UNetConfig
from medvision.models.unet_criterion import SegmentationCriterion
from medvision.stacks.augment import AugmentConfig, Augmenter
from medvision.stacks.config import StackConfig
from medvision.training.cache import CachedCase, cache_case
from medvision.training.config import SamplingConfig
from medvision.training.samples import CropSampler, find_training_lesions
from medvision.training.segmentation_target import IGNORED
from medvision.training.targets import (
    CropLabel,
    OutlineTargets,
    enter_label,
    make_target,
    unsure_region,
)

OUTLINES = OutlineTargets(4.0, 5.0)
PLAIN = AugmentConfig(enabled=False)
BOXES = (Box(4, 10, 6, 8, 22, 16), Box(12, 30, 26, 14, 42, 40))


def boxed_case(tmp_path: Path, loaded: LoadedCase | None = None) -> CachedCase:
    """A scan with two lesions that nobody outlined."""
    marked = [Annotation(number, "solid", box) for number, box in enumerate(BOXES, start=1)]
    loaded = loaded or case_with(*marked)
    return cache_case(loaded, tmp_path, loaded.volume.spacing_mm[1], (-1000, 400))


def sampler_of(
    cases: list[CachedCase], augment: AugmentConfig | None = None, **sampling: Any
) -> CropSampler:
    settings = SamplingConfig(crop_size=48, **sampling)
    augmenter = Augmenter(augment or AugmentConfig(), 48)
    lesions = find_training_lesions(cases, ("solid",))
    return CropSampler(cases, lesions, StackConfig(n_slices=3), settings, augmenter, 3, OUTLINES)


def test_the_box_follows_the_pixels_and_holds_all_that_it_touches(tmp_path: Path) -> None:
    drawn = Annotation(5, "solid", Box(2, 4, 4, 3, 6, 6), np.ones((1, 2, 2), bool))
    marked = Annotation(3, "solid", Box(10, 20.4, 16, 12, 25.5, 24))
    case = cache_case(case_with(drawn, marked), tmp_path, 0.35, (-1000, 400))
    # 64 rows of 0.8 mm become 146 of 0.35 mm, 48 columns of 0.7 mm become 96; half pixels grow before.
    assert case.boxed == {3: Box(10, 20 * 146 / 64, 32, 12, 26 * 146 / 64, 48)}
    found = {item.label: item.box for item in case.annotations()}
    assert (found[3].lower >= np.floor(case.boxed[3].lower)).all()
    assert (found[3].upper <= np.ceil(case.boxed[3].upper)).all()
    assert [len(case.boxes_near(plane, 1)) for plane in (8, 9, 10, 11, 12, 13)] == [
        0,
        1,
        1,
        1,
        1,
        0,
    ]
    assert len(case.boxes_near(9, 0)) == 0


def test_the_region_of_a_box_is_cut_as_the_crop_is() -> None:
    boxes = [Box(0, 5, 7, 1, 9, 12), Box(0, 18, 2, 1, 40, 5.5), Box(0, 0, 0, 1, 4, 4)]
    region = unsure_region(boxes, 4, 3, 20)
    expected = np.zeros((20, 20), bool)
    expected[1:5, 4:9] = True
    expected[14:20, 0:3] = True
    assert (region == expected).all()


def two_lesions(*outlined: bool) -> tuple[np.ndarray, list[CropLabel]]:
    labels = np.zeros((32, 32), dtype=np.uint8)
    labels[10:14, 8:12], labels[11:13, 16:18] = 1, 2
    table = [CropLabel(1, 16, True, outlined[0]), CropLabel(0, 4, True, outlined[1])]
    return labels, table


def test_a_crop_of_outlined_lesions_is_learned_as_it_is_drawn() -> None:
    labels, table = two_lesions(True, True)
    target = make_target(labels, table, 0.5, OUTLINES)
    assert target["masks"].numpy().tolist() == [(labels == 1).tolist(), (labels == 2).tolist()]
    assert target["class_map"].numpy().tolist() == np.array([0, 2, 1])[labels].tolist()
    assert target["added_weights"].max() > 0
    elsewhere = np.zeros((32, 32), bool)
    elsewhere[20:24, 3:9] = True
    unsure = make_target(labels, table, 0.5, OUTLINES, elsewhere)
    assert torch.equal(unsure["masks"], target["masks"])
    changed = unsure["class_map"] != target["class_map"]
    assert (changed.numpy() == elsewhere).all()
    assert (unsure["class_map"][changed] == IGNORED).all()


def test_of_a_lesion_without_an_outline_the_box_alone_is_learned() -> None:
    labels, table = two_lesions(True, False)
    region = np.zeros((32, 32), bool)
    region[10:15, 11:19] = True  # its box reaches a column into the other lesion
    target = make_target(labels, table, 0.5, OUTLINES, region)
    known = make_target(*two_lesions(True, True), 0.5, OUTLINES)
    for key in ("boxes", "labels", "ignored"):
        assert torch.equal(target[key], known[key])  # type: ignore[literal-required]
    assert torch.equal(target["masks"][0], known["masks"][0])
    assert target["masks"].flatten(1).any(dim=1).tolist() == [True, False]
    expected = np.where(labels == 1, 2, np.where(region, IGNORED, 0))
    assert (target["class_map"].numpy() == expected).all()
    # One outline is no border, whatever ellipse is beside it.
    assert target["added_weights"].max() == 0


def test_masks_stay_where_the_lesion_without_an_outline_has_no_box() -> None:
    labels, _ = two_lesions(True, False)
    for beside in (CropLabel(None, outlined=False), CropLabel(0, 400, False, False)):
        target = make_target(labels, [CropLabel(1, 16, True), beside], 0.5, OUTLINES)
        assert target["masks"].shape == (1, 32, 32)
        assert (target["class_map"].numpy()[labels == 2] == IGNORED).all()
        assert target["added_weights"].max() == 0


def test_a_full_table_forgets_no_missing_outline() -> None:
    crop, table = np.zeros((20, 20), np.uint8), []
    for number in range(256):
        mask = np.zeros((20, 20), bool)
        mask.flat[number] = True
        enter_label(crop, table, mask, CropLabel(0, 1, True, outlined=number != 254))
    assert len(table) == 254
    assert [entry.outlined for entry in table] == [True] * 253 + [False]


def test_no_slice_shows_the_ellipsoid_as_an_outline(tmp_path: Path) -> None:
    drawn = Annotation(5, "solid", Box(4, 24, 6, 8, 28, 12), np.ones((4, 4, 6), bool))
    marked = Annotation(1, "solid", BOXES[0])
    sampler = sampler_of([boxed_case(tmp_path, case_with(drawn, marked))])
    for plane in (3, 4, 7, 8):  # the outer two show where the lesions' ends are not sure
        _, table = sampler._label_crop(0, plane, 0, 0)
        assert [entry.outlined for entry in table] == [False, True]


def test_boxes_and_draws_do_not_ask_for_outlines(tmp_path: Path) -> None:
    """The same label map, once as readers drew it, once guessed: a detector sees no difference."""
    case = boxed_case(tmp_path)
    guessed, drawn = sampler_of([case]), sampler_of([replace(case, boxed={})])
    lesions = 0
    for index in range(60):
        one, other = guessed[index], drawn[index]
        assert torch.equal(one.image, other.image)
        for key in ("boxes", "labels", "ignored"):
            assert torch.equal(one.target[key], other.target[key])  # type: ignore[literal-required]
        there: Any = one.target
        assert there["masks"].shape == (len(there["boxes"]), *there["class_map"].shape)
        assert not there["masks"].any()
        assert set(there["class_map"].unique().tolist()) <= {0, IGNORED}
        assert there["added_weights"].max() == 0
        assert len(other.target["masks"]) == len(there["boxes"])  # type: ignore[typeddict-item]
        lesions += len(there["boxes"])
    assert lesions > 20


def test_all_of_the_box_is_ignored_however_the_crop_is_turned(tmp_path: Path) -> None:
    marked = [Annotation(number, "solid", box) for number, box in enumerate(BOXES, start=1)]
    loaded = case_with(*marked)
    loaded.volume.array[:] = -1000
    for box in BOXES:
        # A slice further too, where a reader cannot tell where the lesion ends.
        loaded.volume.array[box.slices][:] = 400
        loaded.volume.array[int(box.slice_min) - 1, *box.slices[1:]] = 400
        loaded.volume.array[int(box.slice_max), *box.slices[1:]] = 400
    turned = AugmentConfig(affine_p=1, intensity_p=0, noise_p=0)
    sampler = sampler_of([boxed_case(tmp_path, loaded)], turned, paste_share=0, lesion_share=0.5)
    sampler.stack = StackConfig(n_slices=1)
    seen = 0
    for index in range(60):
        sample = sampler[index]
        image, ignored = sample.image[0].numpy(), sample.target["class_map"].numpy() == IGNORED  # type: ignore[typeddict-item]
        inside, outside = image > 0.99, image < 0.01
        assert ignored[inside].all()
        assert not ignored[outside].any()
        seen += int(inside.any())
    assert seen > 20


def test_a_pasted_lesion_without_an_outline_is_ignored_where_it_changed_the_crop(
    tmp_path: Path,
) -> None:
    (tmp_path / "healthy").mkdir()
    healthy = replace(boxed_case(tmp_path / "healthy", case_with()), case_id="healthy")
    cases = [boxed_case(tmp_path), healthy]
    plain = sampler_of(cases, PLAIN, lesion_share=0, paste_share=0)
    pasting = sampler_of(cases, PLAIN, lesion_share=0, paste_share=1)
    outlined = [replace(case, boxed={}) for case in cases]
    drawing = sampler_of(outlined, PLAIN, lesion_share=0, paste_share=1)
    pasted = 0
    for index in range(60):
        before, after = plain[index], pasting[index]
        changed = (before.image != after.image).any(dim=0)
        target: Any = after.target
        if after.case_id != "healthy" or not changed.any():
            continue
        pasted += 1
        assert len(target["boxes"]) + len(target["ignored"]) == 1
        assert len(target["masks"]) == len(target["boxes"])
        assert not target["masks"].any()
        # Beyond the window's ends a change does not show in the image.
        assert (target["class_map"][changed] == IGNORED).all()
        kept = target["class_map"] == 0
        assert kept.sum() > 0.5 * kept.numel()
        known: Any = drawing[index].target
        if len(known["boxes"]):
            assert (known["class_map"] == known["masks"][0]).all()
    assert pasted > 3


def test_the_segmentation_losses_do_not_see_the_box(tmp_path: Path) -> None:
    case = boxed_case(tmp_path)
    sample = sampler_of([case], PLAIN, lesion_share=1, paste_share=0)[0]
    target: Any = sample.target
    ignored = target["class_map"] == IGNORED
    assert ignored.any()
    criterion = SegmentationCriterion(UNetConfig(), torch.ones(1))
    logits = torch.zeros(1, 2, 48, 48, requires_grad=True)
    sum(criterion(RawSegmentation(logits, ()), [target]).values()).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert (logits.grad[0][:, ignored] == 0).all()
    assert (logits.grad[0][:, ~ignored] != 0).all()
