"""Phantoms: what they say is in them is in them."""

import nibabel
import numpy as np
import pydicom
import pytest

from medvision.errors import UsageError
from medvision.sample_data.phantoms import (
    LESION_CLASSES,
    ORIENTATIONS,
    make_phantom,
    write_phantom_dataset,
    write_phantom_series,
)


def values_in(phantom, annotation):
    return phantom.volume.array[annotation.box.slices][annotation.mask]


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_lesions_are_where_the_annotations_say(orientation):
    phantom = make_phantom(orientation=orientation, seed=3, noise_hu=0)
    assert {one.class_name for one in phantom.annotations} == set(LESION_CLASSES)
    means = {one.class_name: values_in(phantom, one).mean() for one in phantom.annotations}
    assert means["ground_glass"] == -550
    assert -540 < means["part_solid"] < 0
    assert means["solid"] == 40


def test_boxes_fit_their_masks_tightly():
    for annotation in make_phantom(seed=1).annotations:
        mask = annotation.mask
        for axis in range(3):
            along = mask.any(axis=tuple(other for other in range(3) if other != axis))
            assert along[0]
            assert along[-1]


def test_lesions_do_not_touch():
    phantom = make_phantom((32, 96, 96), n_lesions=6, seed=2)
    count = np.zeros(phantom.volume.shape, int)
    for annotation in phantom.annotations:
        count[annotation.box.slices] += annotation.mask
    assert count.max() == 1
    assert [one.label for one in phantom.annotations] == [1, 2, 3, 4, 5, 6]


def test_same_arguments_same_phantom_other_seed_another():
    first, again, other = make_phantom(seed=5), make_phantom(seed=5), make_phantom(seed=6)
    assert (first.volume.array == again.volume.array).all()
    assert (first.volume.array != other.volume.array).any()


def test_healthy_phantom_has_the_same_anatomy_without_lesions():
    healthy = make_phantom(n_lesions=0, noise_hu=0)
    assert healthy.annotations == ()
    assert set(np.unique(healthy.volume.array)) == {-1000, -850, 30, 40}


@pytest.mark.parametrize(("orientation", "directions"), ORIENTATIONS.items())
def test_orientations_are_rotations_or_mirrors(orientation, directions):
    assert directions.T @ directions == pytest.approx(np.eye(3))
    volume = make_phantom((3, 8, 6), (2.5, 0.8, 0.7), orientation, 0).volume
    assert volume.affine[:3, :3] / [2.5, 0.8, 0.7] == pytest.approx(directions)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(UsageError, match="orientation"):
        make_phantom(orientation="upside down")
    with pytest.raises(UsageError, match="fit the lungs"):
        make_phantom((3, 16, 16), n_lesions=9)


def test_dataset_on_disk(tmp_path):
    case_ids = write_phantom_dataset(tmp_path, 4, shape=(16, 64, 48), n_lesions=2)
    assert sorted(path.name for path in (tmp_path / "scans").iterdir()) == [
        f"{case_id}.nii.gz" for case_id in case_ids
    ]
    labels = [
        np.asarray(nibabel.load(tmp_path / "labels" / f"{case_id}.nii.gz").dataobj)
        for case_id in case_ids
    ]
    assert [int(label.max()) for label in labels] == [2, 2, 2, 0]
    assert (tmp_path / "cases.csv").read_text().splitlines()[1] == "phantom_000,patient_000"
    expected = make_phantom((16, 64, 48), n_lesions=2, seed=0).annotations[0]
    assert (labels[0].T[expected.box.slices] == 1)[expected.mask].all()
    assert (labels[0] == 1).sum() == expected.mask.sum()


def test_series_on_disk(tmp_path):
    files = write_phantom_series(tmp_path, make_phantom((3, 8, 6), n_lesions=0))
    assert [path.name for path in files] == ["IM0001.dcm", "IM0002.dcm", "IM0003.dcm"]
    assert pydicom.dcmread(files[0]).BodyPartExamined == "CHEST"
