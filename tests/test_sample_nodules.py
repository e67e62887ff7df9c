"""Density: the CT's noise stays, ground glass shows vessels, the blend has no seam."""

from __future__ import annotations

import numpy as np
import pytest

from medvision.errors import InputError
from medvision.sample.config import load_config
from medvision.sample.lungs import clean_noise
from medvision.sample.nodules import blend, ground_glass_content, insert_nodule, solid_content

SHAPE = (7, 41, 41)


@pytest.fixture
def lung() -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 25, SHAPE)
    return (-850 + noise).astype(np.float32)


@pytest.fixture
def alpha() -> np.ndarray:
    z, y, x = np.indices(SHAPE) - np.array([3, 20, 20])[:, None, None, None]
    radius = np.sqrt((z * 3.5) ** 2 + y**2 + x**2)
    return np.clip(12 - radius, 0, 1).astype(np.float32)


def insert(class_name: str, lung: np.ndarray, alpha: np.ndarray, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    core = np.clip(alpha * 0, 0, 1)
    core[3, 17:24, 17:24] = 1
    noise = lung + 850
    return insert_nodule(class_name, lung, alpha, core, noise, load_config().density, rng)


def test_blend_is_a_weighted_mean(lung: np.ndarray, alpha: np.ndarray) -> None:
    content = np.full_like(lung, 40)
    result = blend(lung, alpha, content)
    assert (result[alpha == 0] == lung[alpha == 0]).all()
    assert (result[alpha == 1] == 40).all()
    half = (alpha > 0.4) & (alpha < 0.6)
    assert result[half].mean() == pytest.approx(
        (1 - alpha[half]).mean() * -850 + 40 * alpha[half].mean(), abs=15
    )


@pytest.mark.parametrize(
    ("class_name", "low", "high"), [("solid", -40, 100), ("ground_glass", -720, -430)]
)
def test_density_by_class(
    class_name: str, low: float, high: float, lung: np.ndarray, alpha: np.ndarray
) -> None:
    means = [float(insert(class_name, lung, alpha, seed)[alpha == 1].mean()) for seed in range(8)]
    assert low < min(means)
    assert max(means) < high
    assert np.ptp(means) > 20


def test_part_solid_has_a_dense_core_in_ground_glass(lung: np.ndarray, alpha: np.ndarray) -> None:
    result = insert("part_solid", lung, alpha)
    halo = (alpha == 1) & (np.indices(SHAPE)[0] != 3)
    assert result[3, 18:23, 18:23].mean() > -40
    assert -730 < result[halo].mean() < -420


def test_unknown_class_is_refused(lung: np.ndarray, alpha: np.ndarray) -> None:
    with pytest.raises(InputError, match="cavity"):
        insert("cavity", lung, alpha)


def test_noise_inside_is_the_ct_s(lung: np.ndarray, alpha: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    content = solid_content((lung + 850).astype(np.float32), 30.0, 0.0, rng)
    result = blend(lung, alpha, content)
    inside, outside = result[alpha == 1].std(), result[alpha == 0].std()
    assert inside == pytest.approx(outside, rel=0.1)


def test_nothing_changes_outside(lung: np.ndarray, alpha: np.ndarray) -> None:
    for class_name in ("solid", "ground_glass", "part_solid"):
        result = insert(class_name, lung, alpha)
        assert (result[alpha == 0] == lung[alpha == 0]).all()


def test_vessels_stay_visible_in_ground_glass(lung: np.ndarray, alpha: np.ndarray) -> None:
    lung[:, 20, :] = 0
    glass = ground_glass_content(lung, alpha, -550.0, 0.1, np.random.default_rng(0))
    vessel, around = glass[:, 20, 12:28].mean(), glass[:, 15, 12:28].mean()
    assert vessel == pytest.approx(0, abs=30)
    assert around == pytest.approx(-550, abs=60)


def test_thin_ground_glass_is_still_visible(lung: np.ndarray) -> None:
    faint = np.zeros(SHAPE, np.float32)
    faint[3, 19:22, 19:22] = 0.4
    result = blend(
        lung, faint, ground_glass_content(lung, faint, -700.0, 0.0, np.random.default_rng(0))
    )
    assert (result - lung)[3, 19:22, 19:22].mean() > 90


def test_vessels_do_not_show_in_the_noise() -> None:
    noise = np.random.default_rng(0).normal(0, 20, (2, 64, 64)).astype(np.float32)
    residual = noise.copy()
    residual[:, 30:33, :] += 400
    clean = clean_noise(residual, np.ones(residual.shape, bool))
    assert abs(clean[:, 30:33].mean()) < 5
    assert clean[:, 30:33].std() == pytest.approx(20, rel=0.25)
    kept = np.abs(noise) < 40
    kept[:, 30:33] = False
    assert (clean[kept] == noise[kept]).all()
