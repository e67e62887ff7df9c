"""Outlines: where the model drew them, on whatever grid it saw the scan."""

from __future__ import annotations

import numpy as np
import pytest

from medvision.findings.assemble import finding_mask, make_finding
from medvision.findings.finding import SliceBox
from medvision.findings.merge import LinkedLesion, SliceDetections
from medvision.findings.outline import Outline
from medvision.geometry import Box, make_affine

L_SHAPE = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 1]], dtype=bool)


def test_an_outline_lies_where_it_was_cut() -> None:
    grid = Outline(L_SHAPE, 4, 7).on_grid((10, 12), 0, 0)
    assert grid.sum() == 5
    np.testing.assert_array_equal(grid[4:7, 7:10], L_SHAPE)
    shifted = Outline(L_SHAPE, 4, 7).on_grid((3, 2), 5, 7)
    np.testing.assert_array_equal(shifted, [[1, 0], [1, 1], [0, 0]])


def test_on_a_grid_twice_as_fine_every_pixel_becomes_four() -> None:
    grid = Outline(L_SHAPE, 4, 7).scaled(2, 2).on_grid((20, 24), 0, 0)
    np.testing.assert_array_equal(grid[8:14, 14:20], L_SHAPE.repeat(2, 0).repeat(2, 1))
    assert grid.sum() == 20


@pytest.mark.parametrize(("height", "width"), [(0.5, 2.0), (1.37, 0.8)])
def test_the_area_follows_the_scale(height: float, width: float) -> None:
    disc = np.hypot(*np.indices((40, 40)) - 19.5) < 19
    grid = Outline(disc, 10, 20).scaled(height, width).on_grid((120, 120), 0, 0)
    assert grid.sum() == pytest.approx(disc.sum() * height * width, rel=0.05)
    rows, columns = np.nonzero(grid)
    assert rows.mean() + 0.5 == pytest.approx(30 * height, abs=0.5)
    assert columns.mean() + 0.5 == pytest.approx(40 * width, abs=0.5)


def test_a_finding_takes_the_outline_and_an_ellipse_where_there_is_none() -> None:
    boxes = (SliceBox(2, 4, 7, 7, 10, 0.9), SliceBox(3, 4, 7, 7, 10, 0.5))
    outlines = [Outline(L_SHAPE, 4, 7), Outline(np.zeros((3, 3), dtype=bool), 4, 7)]
    mask = finding_mask(boxes, Box(2, 4, 7, 4, 7, 10), outlines)
    np.testing.assert_array_equal(mask[0], L_SHAPE)
    assert mask[1].sum() >= 5
    assert not np.array_equal(mask[1], L_SHAPE)


def test_volume_and_label_follow_the_outline_through_scaling() -> None:
    detections = SliceDetections(
        np.array([1]),
        np.array([[7.0, 4.0, 10.0, 7.0]]),
        np.array([0.8]),
        np.array([[0.2, 0.8]]),
        (Outline(L_SHAPE, 4, 7),),
    ).scaled(2.0, 2.0)
    affine = make_affine((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2.0, 0.5, 0.5))
    lesion = LinkedLesion(np.array([0]), 0.8)
    finding = make_finding(1, lesion, detections, ("a", "b"), (3, 40, 40), affine)
    assert finding.mask is not None
    assert finding.mask.sum() == 20
    assert finding.volume_mm3 == pytest.approx(20 * 2.0 * 0.25)
    assert (finding.box.row_min, finding.box.column_min) == (8, 14)
