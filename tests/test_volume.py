"""Volume: rules that hold once it is built, and crops that stay in place."""

import numpy as np
import pytest

from medvision.errors import InputError
from medvision.geometry import Box
from medvision.sample_data.phantoms import ORIENTATIONS, make_phantom
from medvision.scans.volume import ScanSource, Volume

EYE = np.eye(4)


def test_shape_and_spacing_are_slice_row_column():
    volume = make_phantom((5, 12, 9), (3.0, 0.8, 0.7), "oblique", 0).volume
    assert volume.shape == (5, 12, 9)
    assert volume.spacing_mm == pytest.approx((3.0, 0.8, 0.7))


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 4), (4, 0, 4), (1, 2, 3, 4)])
def test_arrays_that_are_no_volume_are_refused(shape):
    with pytest.raises(InputError, match="three dimensions"):
        Volume(np.zeros(shape, np.int16), EYE)


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(3),
        np.full((4, 4), np.nan),
        np.diag([0.0, 1, 1, 1]),
        np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    ],
)
def test_affines_that_place_nothing_are_refused(affine):
    with pytest.raises(InputError):
        Volume(np.zeros((2, 2, 2), np.int16), affine)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_index_to_patient_and_back(orientation):
    volume = make_phantom((5, 12, 9), orientation=orientation, n_lesions=0).volume
    points = np.random.default_rng(0).uniform(-1, 12, (6, 3))
    assert volume.patient_to_index(volume.index_to_patient(points)) == pytest.approx(points)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_crop_keeps_every_voxel_at_its_place(orientation):
    volume = make_phantom((6, 12, 9), orientation=orientation, n_lesions=0).volume
    crop = volume.crop(Box(1, 2.5, 3, 4, 7, 20))
    assert crop.shape == (3, 5, 6)
    assert (crop.array == volume.array[1:4, 2:7, 3:9]).all()
    assert crop.index_to_patient([0, 0, 0]) == pytest.approx(volume.index_to_patient([1, 2, 3]))
    assert crop.index_to_patient([2, 4, 5]) == pytest.approx(volume.index_to_patient([3, 6, 8]))


def test_crop_keeps_the_uids_of_its_slices():
    source = ScanSource(sop_instance_uids=("1.1", "1.2", "1.3", "1.4"))
    volume = Volume(np.zeros((4, 3, 3), np.int16), EYE, source, ("a note",))
    crop = volume.crop(Box(1, 0, 0, 3, 3, 3))
    assert crop.source.sop_instance_uids == ("1.2", "1.3")
    assert crop.notes == ("a note",)


def test_crop_outside_is_refused():
    with pytest.raises(InputError):
        Volume(np.zeros((4, 3, 3), np.int16), EYE).crop(Box(4, 0, 0, 5, 3, 3))


def test_box_to_patient_uses_the_volume_s_own_affine():
    volume = make_phantom((5, 12, 9), (3.0, 0.8, 0.7), n_lesions=0).volume
    box = volume.box_to_patient(Box(0, 0, 0, 5, 12, 9))
    assert box.x_max_mm - box.x_min_mm == pytest.approx(9 * 0.7)
    assert box.y_max_mm - box.y_min_mm == pytest.approx(12 * 0.8)
    assert box.z_max_mm - box.z_min_mm == pytest.approx(5 * 3.0)
