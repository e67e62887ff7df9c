"""A pasted lesion is where its mask says, and only in places that look like its own."""

from __future__ import annotations

import numpy as np
import pytest

from medvision.training.cache import CachedCase
from medvision.training.paste import Cutout, cut_out, paste

OFFSETS = np.array([-1.0, 0.0, 1.0])


def block(rows: int, columns: int) -> Cutout:
    """Return a bright lesion of so many pixels on slices 5..7 of dark lung."""
    array = np.full((12, 40, 40), -850, dtype=np.int16)
    labels = np.zeros(array.shape, dtype=np.uint16)
    window = (slice(5, 8), slice(12, 12 + rows), slice(10, 10 + columns))
    array[window], labels[window] = 30, 3
    case = CachedCase("a", "p", array, labels, np.eye(4), "CT", (-1000, 400), {3: "x"}, frozenset())
    return cut_out(case, 3, window, 3)


@pytest.fixture
def cutout() -> Cutout:
    return block(4, 6)


def lung(value: float = -840) -> tuple[np.ndarray, np.ndarray]:
    return np.full((3, 64, 64), value, dtype=np.float32), np.zeros((64, 64), dtype=bool)


def test_the_cutout_holds_the_lesion_and_covers_it_wholly(cutout: Cutout) -> None:
    assert cutout.background == -850
    assert cutout.mask.sum() == 3 * 4 * 6
    assert cutout.cover[cutout.mask].min() > 0.9
    assert cutout.cover.max() <= 1.0 + 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_the_mask_lies_on_the_lesion_and_the_rest_is_untouched(cutout: Cutout, seed: int) -> None:
    stack, occupied = lung()
    before = stack.copy()
    mask = paste(stack, occupied, cutout, OFFSETS, 1400, 8, np.random.default_rng(seed))
    assert mask is not None
    assert mask.sum() == 24
    assert stack[1][mask].min() > -50
    changed = np.abs(stack - before).max(axis=0) > 50
    assert mask[changed].sum() == mask.sum()
    assert changed.sum() <= 24 + 2 * (4 + 6 + 2) + 4
    assert not changed[:8].any()
    assert not changed[:, -8:].any()


def test_no_place_leaves_the_stack_alone(cutout: Cutout) -> None:
    generator = np.random.default_rng(0)
    for value, taken in ((-840, True), (40, False)):
        stack, occupied = lung(value)
        occupied[:] = taken
        before = stack.copy()
        assert paste(stack, occupied, cutout, OFFSETS, 1400, 8, generator) is None
        np.testing.assert_array_equal(stack, before)
    small = np.full((3, 20, 20), -840, dtype=np.float32)
    assert paste(small, np.zeros((20, 20), bool), cutout, OFFSETS, 1400, 8, generator) is None


@pytest.mark.parametrize(
    ("value", "like"), [(-1000, False), (-910, False), (-900, True), (-750, True), (-730, False)]
)
def test_lung_nodules_go_into_lung_and_not_into_gas(
    cutout: Cutout, value: float, like: bool
) -> None:
    stack, occupied = lung(value)
    mask = paste(stack, occupied, cutout, OFFSETS, 1400, 8, np.random.default_rng(0))
    assert (mask is not None) == like


def test_where_vessels_are_everywhere_there_is_no_place(cutout: Cutout) -> None:
    stack, occupied = lung()
    stack[:, ::3] = 0.0
    generator = np.random.default_rng(0)
    assert paste(stack, occupied, cutout, OFFSETS, 1400, 8, generator) is None


@pytest.mark.parametrize("value", [30.0, 200.0])
def test_a_lesion_may_be_attached_to_a_wall_which_stays_as_it_is(value: float) -> None:
    """Of a wall beside lung nothing is covered or darkened; what lies on it is not in the mask."""
    cutout, attached = block(8, 8), 0
    for seed in range(200):
        stack, occupied = lung()
        stack[:, :, 40:] = value
        before = stack.copy()
        mask = paste(stack, occupied, cutout, OFFSETS, 1400, 8, np.random.default_rng(seed))
        assert mask is not None
        assert not mask[:, 40:].any()
        assert 0.75 * 64 <= mask.sum() <= 64
        assert (stack[1][mask] > -50).all()
        assert (stack[:, :, 40:] >= before[:, :, 40:]).all()
        assert stack.max() <= value + 1e-3
        attached += bool(mask[:, 39].any())
    assert 5 < attached < 60


def test_a_vessel_through_a_lesion_is_inside_its_outline() -> None:
    stack, occupied = lung()
    stack[:, 30:33, 30:33] = 300.0
    cutout, through = block(12, 12), 0
    for seed in range(300):
        here = stack.copy()
        mask = paste(here, occupied, cutout, OFFSETS, 1400, 8, np.random.default_rng(seed))
        assert mask is not None
        if mask[29:34, 29:34].all():
            through += 1
            assert mask.sum() == 144
            assert (here[1, 30:33, 30:33] == 300).all()
    assert through > 3


def pasted(cutout: Cutout, factor: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a stack of lung with the lesion in it at ``factor`` times its size, and its mask."""
    stack, occupied = lung()
    generator = np.random.default_rng(seed)
    mask = paste(stack, occupied, cutout, OFFSETS, 1400, 8, generator, (factor, factor))
    assert mask is not None
    return stack, mask


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.25, 1.5])
def test_a_zoomed_lesion_has_the_size_it_was_given(factor: float) -> None:
    cutout = block(12, 16)
    stack, mask = pasted(cutout, factor, 0)
    rows, columns = (np.ptp(np.flatnonzero(mask.any(axis=axis))) + 1 for axis in (1, 0))
    assert sorted((rows, columns)) == pytest.approx([12 * factor, 16 * factor], abs=1)
    assert stack[1][mask].mean() > -60
    assert np.abs(stack[1] + 840)[~mask].mean() < 20


def test_no_lesion_is_made_much_less_wide_than_four_pixels() -> None:
    for factor in (0.1, 0.5):
        mask = pasted(block(4, 6), factor, 0)[1]
        assert 3 <= max(np.ptp(np.flatnonzero(mask.any(axis=axis))) + 1 for axis in (0, 1)) <= 4
    assert pasted(block(2, 3), 0.5, 0)[1].sum() == 6


def test_zooming_out_brings_the_next_slices_nearer(cutout: Cutout) -> None:
    """Three slices of lesion at two thirds of their size fill two."""

    def lit(factor: float) -> float:
        made = (pasted(cutout, factor, seed) for seed in range(24))
        return float(np.mean([sum((p[mask] > -100).all() for p in stack) for stack, mask in made]))

    assert lit(2 / 3) < lit(1.0)
