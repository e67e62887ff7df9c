"""Slices and masks move together; boxes are those of the moved masks."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from medvision.stacks.augment import AugmentConfig, Augmenter, boxes_from_labels


def scene(size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A stack whose every slice shows its lesions as bright as their label says."""
    labels = np.zeros((size, size), dtype=np.uint8)
    labels[40:52, 44:50] = 1
    labels[60:64, 30:48] = 2
    stack = np.repeat(labels[None].astype(np.float32) * 0.4, 5, axis=0)
    return stack, labels


@pytest.mark.parametrize("seed", range(12))
def test_every_slice_moves_with_the_mask(seed: int) -> None:
    stack, labels = scene()
    augmenter = Augmenter(AugmentConfig(affine_p=1, intensity_p=0, noise_p=0), 64)
    moved, moved_labels = augmenter(stack, labels, seed)
    assert moved.shape == (5, 64, 64)
    for plane in moved:
        seen = np.rint(plane / 0.4).astype(int)
        # Linear and nearest interpolation differ on outlines only.
        assert (seen != moved_labels).mean() < 0.03
    for value, (x1, y1, x2, y2) in boxes_from_labels(moved_labels).items():
        rows, columns = np.nonzero(moved_labels == value)
        assert (x1, y1) == (columns.min(), rows.min())
        assert (x2, y2) == (columns.max() + 1, rows.max() + 1)


def test_the_same_seed_draws_the_same_and_another_another() -> None:
    stack, labels = scene()
    augmenter = Augmenter(AugmentConfig(), 64)
    first, again, other = (augmenter(stack, labels, seed)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_switched_off_it_only_trims() -> None:
    stack, labels = scene()
    stack[0] = 0.7
    moved, moved_labels = Augmenter(AugmentConfig(enabled=False), 64)(stack, labels, 1)
    np.testing.assert_array_equal(moved, stack[:, 16:80, 16:80])
    np.testing.assert_array_equal(moved_labels, labels[16:80, 16:80])


def test_slices_are_seen_from_both_ends() -> None:
    stack = np.repeat(np.arange(5, dtype=np.float32)[:, None, None] / 10, 64, axis=1).repeat(64, 2)
    config = AugmentConfig(affine_p=0, intensity_p=0, noise_p=0)
    augmenter = Augmenter(config, 64)
    orders = {
        augmenter(stack, np.zeros((64, 64), np.uint8), seed)[0][0, 0, 0] for seed in range(20)
    }
    assert orders == {np.float32(0.0), np.float32(0.4)}


def test_an_empty_mask_has_no_boxes() -> None:
    assert boxes_from_labels(np.zeros((8, 8), dtype=np.uint8)) == {}


def test_one_transform_does_not_decide_whether_another_is_applied() -> None:
    """With one stream for all, noise came only on top of a changed brightness."""
    config = AugmentConfig(dihedral=False, affine_p=0, intensity_p=0.5, noise_p=0.5)
    augmenter = Augmenter(config, 64)
    stack = np.full((3, 64, 64), 0.5, dtype=np.float32)
    seen = set()
    for seed in range(60):
        moved, _ = augmenter(stack, np.zeros((64, 64), dtype=np.uint8), seed)
        noisy = moved.std() > 1e-5
        seen.add((noisy, bool(abs(np.median(moved) - 0.5) > 2e-3)))
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_importing_albumentations_asks_no_server() -> None:
    # Names are looked up before anything is sent; the package swallows what an attempt raises.
    code = (
        "import socket\nasked = []\n"
        "socket.getaddrinfo = lambda *given, **options: asked.append(given[0]) or 1 / 0\n"
        "from medvision.stacks.augment import AugmentConfig, Augmenter\n"
        "Augmenter(AugmentConfig(), 64)\nimport albumentations\nprint(asked)"
    )
    free = {name: value for name, value in os.environ.items() if "ALBUMENTATIONS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=free, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
