"""Cases on a synthetic chest: labels where nodules are, decoys without labels, nothing overlapping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medvision import geometry
from medvision.errors import InputError
from medvision.geometry import Box
from medvision.labels.annotation import Annotation
from medvision.sample.cases import MadeCase, lung_window, make_test_case, make_train_case
from medvision.sample.config import SampleConfig, load_config
from medvision.sample.donors import Plan
from medvision.sample.elsewhere import candidates, choose_elsewhere
from medvision.sample.lidc import Contour, Nodule, Outline
from medvision.sample.lungs import Chest, find_lung, make_chest, read_axial, read_chest
from medvision.sample.scene import Scene, find_place
from medvision.scans.images import write_image
from medvision.scans.volume import ScanSource, Volume

SHAPE = (36, 150, 220)
RIGHT, LEFT = 12, 10


def lobes() -> np.ndarray:
    """Two ellipsoid lungs, the right one at low columns."""
    z, y, x = np.indices(SHAPE)
    labels = np.zeros(SHAPE, np.uint8)
    for value, middle in ((RIGHT, 60), (LEFT, 165)):
        inside = ((z - 18) / 16) ** 2 + ((y - 75) / 65) ** 2 + ((x - middle) / 48) ** 2 < 1
        labels[inside] = value
    return labels


def hu() -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 20, SHAPE)
    return np.rint(np.where(lobes() > 0, -860, 40) + noise).astype(np.int16)


@pytest.fixture(scope="module")
def chest() -> Chest:
    affine = geometry.make_affine(
        (-77, -52, -300), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2.5, 0.7, 0.7)
    )
    volume = Volume(hu(), affine, ScanSource(patient_id="secret", modality="CT"))
    return make_chest(volume, find_lung(lobes(), (RIGHT,)), find_lung(lobes(), (LEFT,)))


@pytest.fixture(scope="module")
def config() -> SampleConfig:
    config = load_config()
    train = config.train.model_copy(update={"size": (20, 80, 80)})
    return config.model_copy(update={"train": train})


def nodule(radius_px: float, texture: int, name: int) -> Nodule:
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = 100 + radius_px * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    contours = tuple(Contour(circle, 2.5 * i) for i in range(max(1, int(radius_px / 3))))
    return Nodule(f"P{name}", name, (Outline(name, texture, contours, 0.7, 2.5),))


def plan(*nodules: Nodule) -> Plan:
    return Plan("train_000", nodules, nodule(5, 5, 99).outlines)


def masks(case: MadeCase) -> np.ndarray:
    labels = np.zeros(case.volume.shape, int)
    for item in case.annotations:
        labels[item.box.slices][item.mask] = item.label
    return labels


FAR = Annotation(1, "solid", Box(0, 0, 0, 1, 2, 2), np.ones((1, 2, 2), bool))
"""The CT's own nodule in a corner that no training window reaches."""


def base_of(chest: Chest, case: MadeCase) -> np.ndarray:
    start = np.rint(chest.volume.patient_to_index(case.volume.index_to_patient([0, 0, 0])))
    low = start.astype(int)
    return chest.volume.array[
        tuple(slice(a, a + n) for a, n in zip(low, case.volume.shape, strict=True))
    ]


@pytest.fixture(scope="module")
def case(chest: Chest, config: SampleConfig) -> MadeCase:
    nodules = [nodule(8, 5, 1), nodule(4, 1, 2), nodule(6, 5, 3)]
    return make_train_case(chest, plan(*nodules), 0, config, FAR)


def test_training_case_is_a_piece_of_the_ct_in_its_place(
    chest: Chest, config: SampleConfig, case: MadeCase
) -> None:
    assert case.volume.shape == config.train.size
    assert case.volume.array.dtype == np.int16
    changed = case.volume.array != base_of(chest, case)
    assert 0 < changed.mean() < 0.2


def small_windows(config: SampleConfig) -> SampleConfig:
    train = config.train.model_copy(update={"size": (8, 40, 60), "min_lung_fraction": 0.1})
    return config.model_copy(update={"train": train})


def test_a_case_from_elsewhere_is_the_ct_in_its_place(chest: Chest, config: SampleConfig) -> None:
    config = small_windows(config)
    place = choose_elsewhere(chest, config, 3)[2]
    case = make_train_case(chest, replace(plan(), elsewhere=True), 0, config, FAR, place)
    low = chest.volume.patient_to_index(case.volume.index_to_patient([0, 0, 0]))
    np.testing.assert_allclose(low, place.lower, atol=1e-3)
    assert case.annotations == ()
    assert case.donated == ()
    assert (case.volume.array == base_of(chest, case)).mean() > 0.8  # but for decoys


def test_places_elsewhere_show_body_and_nothing_of_the_test_lung(
    chest: Chest, config: SampleConfig
) -> None:
    config = small_windows(config)
    test = lung_window(chest, config.test.margin)
    for box in choose_elsewhere(chest, config, 12):
        assert (box.upper - box.lower == config.train.size).all()
        assert (box.lower >= 0).all()
        assert (box.upper <= SHAPE).all()
        assert (np.minimum(box.upper, test.upper) <= np.maximum(box.lower, test.lower)).any()
        # Of such small sub-volumes few voxels are counted.
        assert chest.right.mask[box.slices].mean() < 0.2
        assert (chest.volume.array[box.slices] > -300).mean() > 0.4


EDGE = np.array([2, 16, 16])


def worth_of(boxes: list[Box], chest: Chest) -> float:
    """Return what the inner parts show of the body: each place 1 once, a third more however often again."""
    times = np.zeros(SHAPE)
    for box in boxes:
        low, high = (box.lower + EDGE).astype(int), (box.upper - EDGE).astype(int)
        times[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] += 1
    series = (1 - 0.25**times) / (1 - 0.25)  # 1 + 1/4 + 1/16 ...
    return float(series[chest.volume.array > -300].sum())


def test_together_they_show_more_of_the_body_than_the_same_number_drawn(
    chest: Chest, config: SampleConfig
) -> None:
    larger = {"size": (12, 64, 76), "min_lung_fraction": 0.6}
    config = config.model_copy(update={"train": config.train.model_copy(update=larger)})
    chosen = choose_elsewhere(chest, config, 6)
    assert choose_elsewhere(chest, config, 6) == chosen
    assert choose_elsewhere(chest, config, 4) == chosen[:4]
    assert choose_elsewhere(chest, config, 0) == []
    drawn = candidates(chest, config)
    others = [worth_of(drawn[n : n + 6], chest) for n in range(0, 300, 6)]
    assert worth_of(chosen, chest) > max(others)
    assert worth_of(chosen, chest) > 1.2 * np.mean(others)
    # Each step takes what adds most, counted on every second slice and eighth row and column.
    added = np.diff([worth_of(chosen[:n], chest) for n in range(7)])
    assert (added[1:] <= 1.3 * added[:-1]).all()


def test_no_body_outside_the_test_lung_is_refused(chest: Chest, config: SampleConfig) -> None:
    empty = replace(chest, volume=replace(chest.volume, array=np.full(SHAPE, -1000, np.int16)))
    with pytest.raises(InputError, match="lies in the body"):
        choose_elsewhere(empty, config, 1)


def test_labels_lie_on_what_was_put_in(chest: Chest, case: MadeCase) -> None:
    base, new = base_of(chest, case), case.volume.array
    labels = masks(case)
    for item in case.annotations:
        rise = float((new - base)[labels == item.label].mean())
        assert rise > (500 if item.class_name == "solid" else 80), item
    assert sorted(a.class_name for a in case.annotations) == ["ground_glass", "solid", "solid"]


@pytest.mark.parametrize("index", range(4))
def test_nodules_are_whole(chest: Chest, config: SampleConfig, index: int) -> None:
    """What is put in later may share a window with an earlier nodule, but not undo it."""
    made = make_train_case(chest, plan(*[nodule(7, 5, i) for i in range(4)]), index, config, FAR)
    labels = masks(made)
    for label in range(1, 5):
        inside = made.volume.array[labels == label]
        assert np.mean(inside > -500) > 0.9


def test_decoys_are_there_and_unlabelled(chest: Chest, config: SampleConfig) -> None:
    changed = 0
    for index in range(5):
        made = make_train_case(chest, plan(), index, config, FAR)
        assert made.annotations == ()
        assert 1 <= len(made.decoys) <= config.train.decoys[1]
        changed += int((made.volume.array != base_of(chest, made)).sum())
    assert changed > 50


def test_nothing_overlaps_and_gaps_are_kept(
    chest: Chest, config: SampleConfig, case: MadeCase
) -> None:
    from scipy.ndimage import distance_transform_edt

    labels = masks(case)
    assert len(set(labels.ravel()) - {0}) == 3
    for label in (1, 2, 3):
        others = (labels > 0) & (labels != label)
        distance = distance_transform_edt(~others, sampling=case.volume.spacing_mm)
        assert distance[labels == label].min() >= config.placement.gap_mm
    for decoy in case.decoys:
        assert labels[decoy.center] == 0


def test_the_same_seed_makes_the_same_voxels(
    chest: Chest, config: SampleConfig, case: MadeCase
) -> None:
    nodules = [nodule(8, 5, 1), nodule(4, 1, 2), nodule(6, 5, 3)]
    again = make_train_case(chest, plan(*nodules), 0, config, FAR)
    assert (again.volume.array == case.volume.array).all()
    assert again.decoys == case.decoys
    other = make_train_case(chest, plan(*nodules), 0, config.model_copy(update={"seed": 7}), FAR)
    assert not np.array_equal(other.volume.array, case.volume.array)


def test_no_identifier_is_carried_on(case: MadeCase) -> None:
    assert case.volume.source == ScanSource(modality="CT")


def test_test_case_is_the_left_lung_with_the_own_nodule_ignored(
    chest: Chest, config: SampleConfig
) -> None:
    box = Box(16, 70, 160, 20, 84, 174)
    own = Annotation(1, "solid", box, np.ones((4, 14, 14), bool), ignore=True)
    made = make_test_case(chest, plan(nodule(6, 5, 1)), 0, config, own)
    assert [(a.label, a.ignore) for a in made.annotations] == [(1, False), (2, True)]
    ignored = made.annotations[1]
    voxel = ignored.box.center_index - (box.center_index - box.lower)
    where = made.volume.index_to_patient(voxel)
    assert np.allclose(where, chest.volume.index_to_patient(box.lower))
    labels = masks(made)
    untouched = made.volume.array == base_of(chest, made)
    assert untouched[labels == 2].all()
    assert set(np.argwhere(masks(made) == 1)[:, 0]) & set(range(made.volume.shape[0]))
    lung = chest.left.mask.any(axis=(1, 2)).sum()
    assert made.volume.shape[0] >= lung


def test_the_own_nodule_in_a_training_window_is_ignored_and_left_alone(
    chest: Chest, config: SampleConfig
) -> None:
    low = chest.right.box.lower.astype(int)
    box = Box(*low.tolist(), *(low + np.array([20, 60, 60])).tolist())
    own = Annotation(1, "solid", box, np.ones((20, 60, 60), bool))
    made = make_train_case(chest, plan(), 0, config, own)
    (ignored,) = made.annotations
    assert ignored.ignore
    assert ignored.mask is not None
    labels = masks(made)
    assert (labels == 1).sum() == ignored.mask.sum()
    start = made.volume.index_to_patient([0, 0, 0])
    inside = chest.volume.patient_to_index(start) + ignored.box.lower
    assert (inside >= box.lower - 0.01).all()
    assert (made.volume.array == base_of(chest, made))[labels == 1].all()


def test_a_nodule_without_room_is_refused(chest: Chest, config: SampleConfig) -> None:
    full = config.placement.model_copy(update={"max_mean_hu": -2000.0, "attempts": 5})
    config = config.model_copy(update={"placement": full})
    with pytest.raises(InputError, match="no room"):
        make_train_case(chest, plan(nodule(6, 5, 1)), 0, config, FAR)


def test_places_keep_off_vessels() -> None:
    shape = (9, 40, 40)
    base = np.full(shape, -860, np.float32)
    base[:, :, :20] = -300
    scene = Scene(base, np.zeros(shape, np.float32), np.ones(shape, bool), (2.5, 0.7, 0.7))
    alpha = np.ones((3, 5, 5), np.float32)
    rng = np.random.default_rng(0)
    placement = load_config().placement
    columns = []
    for _ in range(20):
        window = find_place(scene, alpha, placement, rng, in_parenchyma=True)
        assert window is not None
        columns.append(window[2].start)
    assert min(columns) >= 20
    scene.occupied[:] = True
    assert find_place(scene, alpha, placement, rng, in_parenchyma=False) is None


def test_rows_stored_backwards_are_turned_round(tmp_path: Path) -> None:
    """As in the sample's CT: NIfTI rows run from back to front; every voxel must stay in place."""
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    affine = geometry.make_affine((10, 20, 30), (0, 0, -1), (0, -1, 0), (-1, 0, 0), (2.5, 0.7, 0.8))
    stored = Volume(array, affine)
    write_image(tmp_path / "a.nii.gz", stored)
    volume = read_axial(tmp_path / "a.nii.gz")
    assert np.allclose(np.diag(volume.affine[:3, :3][::-1]), (2.5, 0.7, 0.8)[::1])
    for index in np.ndindex(array.shape):
        place = volume.patient_to_index(stored.index_to_patient(index))
        assert volume.array[tuple(np.rint(place).astype(int))] == array[index]


def test_oblique_ct_is_refused(tmp_path: Path) -> None:
    tilt = np.deg2rad(10)
    affine = geometry.make_affine(
        (0, 0, 0),
        (0, 0, 1),
        (-np.sin(tilt), np.cos(tilt), 0),
        (np.cos(tilt), np.sin(tilt), 0),
        (2, 1, 1),
    )
    write_image(tmp_path / "a.nii.gz", Volume(np.zeros((2, 3, 4), np.int16), affine))
    with pytest.raises(InputError, match="parallel"):
        read_axial(tmp_path / "a.nii.gz")


def test_organ_labels_on_another_grid_are_refused(tmp_path: Path, chest: Chest) -> None:
    shifted = chest.volume.affine.copy()
    shifted[0, 3] += 5
    write_image(tmp_path / "ct.nii.gz", chest.volume)
    write_image(tmp_path / "mask.nii.gz", Volume(lobes(), shifted))
    with pytest.raises(InputError, match="grid"):
        read_chest(
            tmp_path / "ct.nii.gz", tmp_path / "mask.nii.gz", (RIGHT,), (LEFT,), ScanSource()
        )


def test_a_missing_lung_is_refused() -> None:
    with pytest.raises(InputError, match="lung lobes"):
        find_lung(lobes(), (99,))
