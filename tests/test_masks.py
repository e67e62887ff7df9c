"""Label volumes and CSVs go through files and back, in every orientation."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from medvision.errors import InputError
from medvision.geometry import Box, box_to_patient, make_affine
from medvision.labels.annotation import Annotation
from medvision.labels.masks import has_labels, read_labels, write_labels
from medvision.labels.table import read_table
from medvision.scans.images import write_image
from medvision.scans.volume import Volume

AXIAL = make_affine((-30, -40, 50), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2.5, 0.7, 0.9))


def oblique(angles=(20, -35, 50), spacing=(3.0, 0.8, 0.6)):
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    return make_affine((12.5, -80.25, 401), *turn, spacing)


def scan(affine=AXIAL, shape=(6, 10, 12)):
    return Volume(np.zeros(shape, np.int16), affine)


def lesion(label, start, mask, name="nodule", ignore=False):
    stop = np.add(start, mask.shape)
    return Annotation(label, name, Box(*start, *stop.tolist()), mask, ignore)


def solid(label, start, size, **rest):
    return lesion(label, start, np.ones(size, bool), **rest)


def to_labels(shape, annotations):
    array = np.zeros(shape, int)
    for item in annotations:
        array[item.box.slices][item.mask] = item.label
    return array


def read(folder, volume, case_id="a", **rest):
    return read_labels(folder, case_id, volume.shape, volume.affine, **rest)


@pytest.mark.parametrize("affine", [AXIAL, oblique(), AXIAL @ np.diag([-1.0, 1, -1, 1])])
def test_round_trip_keeps_every_voxel_class_and_flag(tmp_path, affine):
    volume = scan(affine)
    given_items = [
        solid(1, (0, 1, 2), (2, 3, 1), name="nodule"),
        solid(300, (4, 5, 6), (1, 2, 3), name="lymph node", ignore=True),
    ]
    write_labels(tmp_path, "a", volume, given_items)
    back = read(tmp_path, volume)
    assert [(item.label, item.class_name, item.ignore) for item in back] == [
        (1, "nodule", False),
        (300, "lymph node", True),
    ]
    assert [item.box for item in back] == [item.box for item in given_items]
    np.testing.assert_array_equal(
        to_labels(volume.shape, back), to_labels(volume.shape, given_items)
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    labels=hnp.arrays(
        np.uint8,
        hnp.array_shapes(min_dims=3, max_dims=3, max_side=5),
        elements=st.integers(0, 4),
    ),
    angles=st.tuples(*[st.integers(-180, 180)] * 3),
)
def test_any_label_array_comes_back_as_it_was(tmp_path, labels, angles):
    volume = Volume(labels, oblique(angles))
    items = []
    for value in np.unique(labels[labels > 0]).tolist():
        where = np.argwhere(labels == value)
        low, high = where.min(axis=0), where.max(axis=0) + 1
        window = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        items.append(lesion(value, low.tolist(), labels[window] == value, name=f"class {value}"))
    write_labels(tmp_path, "a", volume, items)
    back = read(tmp_path, volume)
    np.testing.assert_array_equal(to_labels(labels.shape, back), labels)
    assert [item.box for item in back] == [item.box for item in items]


def test_simpleitk_sees_the_voxels_at_the_same_place(tmp_path):
    volume = scan(oblique())
    write_labels(tmp_path, "a", volume, [solid(7, (2, 3, 4), (1, 1, 1))])
    image = SimpleITK.ReadImage(str(tmp_path / "a.nii.gz"))
    assert image.GetPixelID() == SimpleITK.sitkUInt8
    index = image.TransformPhysicalPointToIndex(volume.index_to_patient((2, 3, 4)).tolist())
    assert image[index] == 7
    assert SimpleITK.GetArrayFromImage(image).sum() == 7


def test_csv_holds_boxes_through_all_corners_and_diameters(tmp_path):
    volume = scan(oblique())
    item = solid(1, (1, 2, 3), (2, 1, 4))
    write_labels(tmp_path, "a", volume, [item])
    header = (tmp_path / "a.csv").read_text().splitlines()[0]
    assert header == (
        "label,class,ignore,slice_min,row_min,column_min,slice_max,row_max,column_max,"
        "x_min_mm,y_min_mm,z_min_mm,x_max_mm,y_max_mm,z_max_mm,diameter_mm"
    )
    (row,) = read_table(tmp_path / "a.csv")
    assert row.box == item.box
    want = box_to_patient(volume.affine, item.box)
    for name, value in vars(want).items():
        assert getattr(row.box_mm, name) == pytest.approx(value, abs=1e-3)
    assert row.diameter_mm == pytest.approx(4 * 0.6, abs=1e-3)


def test_healthy_scan_is_a_zero_volume_and_a_header(tmp_path):
    volume = scan()
    write_labels(tmp_path, "a", volume, [])
    assert not np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj).any()
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1
    assert read(tmp_path, volume) == []
    (tmp_path / "a.csv").unlink()
    assert read(tmp_path, volume) == []
    (tmp_path / "a.nii.gz").unlink()
    (tmp_path / "a.csv").write_text("label,class\n")
    assert read(tmp_path, volume) == []


def test_no_file_is_unlabelled_and_not_healthy(tmp_path):
    assert read(tmp_path, scan()) is None
    assert not has_labels(tmp_path, "a")
    (tmp_path / "b.csv").write_text("label,class\n")
    assert has_labels(tmp_path, "b")


def test_scan_beside_its_csv_is_not_its_label_volume(tmp_path):
    volume = Volume(np.full((2, 3, 4), 5, np.int16), AXIAL)
    write_image(tmp_path / "a.nii.gz", volume)
    assert read(tmp_path, volume, scan_path=tmp_path / "a.nii.gz") is None
    assert [item.label for item in read(tmp_path, volume)] == [5]


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("flips", list(product((1, -1), repeat=3)))
def test_permuted_and_flipped_labels_are_reoriented_exactly(tmp_path, order, flips):
    volume = scan(oblique(), (3, 4, 5))
    labels = np.arange(60, dtype=np.int16).reshape(volume.shape)
    array, affine = labels.transpose(order), volume.affine[:, [*order, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip < 0:
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
            array = np.flip(array, axis)
    write_image(tmp_path / "a.nii.gz", Volume(array, affine))
    np.testing.assert_array_equal(to_labels(volume.shape, read(tmp_path, volume)), labels)


def test_as_closest_canonical_of_nibabel_is_read_back(tmp_path):
    volume = scan(oblique((0, 0, 10)), (3, 4, 5))
    labels = np.arange(60, dtype=np.int16).reshape(volume.shape)
    write_image(tmp_path / "a.nii.gz", Volume(labels, volume.affine))
    image = nibabel.as_closest_canonical(nibabel.load(tmp_path / "a.nii.gz"))
    nibabel.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(to_labels(volume.shape, read(tmp_path, volume)), labels)


@pytest.mark.parametrize(
    "moved",
    [
        AXIAL + np.array([[0, 0, 0, 0.5], [0] * 4, [0] * 4, [0] * 4]),
        AXIAL @ np.diag([1.1, 1, 1, 1]),
        AXIAL @ np.diag([1, -1.0, 1, 1]),
    ],
)
def test_labels_elsewhere_are_refused_with_both_geometries(tmp_path, moved):
    volume = scan()
    write_image(tmp_path / "a.nii.gz", Volume(np.ones(volume.shape, np.uint8), moved))
    with pytest.raises(InputError, match=r"Labels: 6 x 10 x 12 .*Scan: 6 x 10 x 12 ") as caught:
        read(tmp_path, volume)
    assert "a.nii.gz" in str(caught.value)
    assert caught.value.do


def test_labels_of_another_shape_are_refused(tmp_path):
    write_image(tmp_path / "a.nii.gz", Volume(np.ones((6, 10, 11), np.uint8), AXIAL))
    with pytest.raises(InputError, match=r"6 x 10 x 11.*6 x 10 x 12"):
        read(tmp_path, scan())


def test_a_shift_below_a_hundredth_mm_is_rounding(tmp_path):
    near = AXIAL.copy()
    near[:3, 3] += 0.005
    write_image(tmp_path / "a.nii.gz", Volume(np.ones((6, 10, 12), np.uint8), near))
    assert len(read(tmp_path, scan())) == 1


def test_whole_floats_are_labels_and_fractions_are_not(tmp_path):
    volume = scan()
    values = np.zeros(volume.shape, np.float32)
    values[1, 1, 1] = 2
    write_image(tmp_path / "a.nii.gz", Volume(values, AXIAL))
    assert [item.label for item in read(tmp_path, volume)] == [2]
    values[2, 2, 2] = 0.5
    write_image(tmp_path / "a.nii.gz", Volume(values, AXIAL))
    with pytest.raises(InputError, match="whole numbers"):
        read(tmp_path, volume)


def test_negative_and_huge_values_are_refused(tmp_path):
    for value in (-1, 70000):
        values = np.zeros((6, 10, 12), np.int32)
        values[0, 0, 0] = value
        write_image(tmp_path / "a.nii.gz", Volume(values, AXIAL))
        with pytest.raises(InputError, match=str(value)):
            read(tmp_path, scan())


def test_csv_and_volume_must_name_the_same_labels(tmp_path):
    volume = scan()
    items = [solid(1, (0, 0, 0), (1, 1, 1)), solid(2, (2, 2, 2), (1, 1, 1))]
    write_labels(tmp_path, "a", volume, items)
    (tmp_path / "a.csv").write_text("label,class\n1,x\n2,y\n9,z\n")
    with pytest.raises(InputError, match=r"only in the CSV: \[9\], only in the volume: \[\]"):
        read(tmp_path, volume)
    (tmp_path / "a.csv").write_text("label,class\n1,x\n")
    with pytest.raises(InputError, match=r"only in the volume: \[2\]"):
        read(tmp_path, volume)


def test_binary_volume_without_csv_is_one_lesion_per_component(tmp_path):
    volume = scan()
    values = np.zeros(volume.shape, np.uint8)
    values[0, 0, 0] = values[1, 1, 1] = 1  # 26-connected by a corner
    values[4, 5, 6:8] = 1
    write_image(tmp_path / "a.nii.gz", Volume(values, AXIAL))
    items = read(tmp_path, volume)
    assert [(item.label, item.class_name, int(item.mask.sum())) for item in items] == [
        (1, "lesion", 2),
        (2, "lesion", 2),
    ]
    (tmp_path / "a.csv").write_text("label,class\n1,scattered\n")
    (whole,) = read(tmp_path, volume)
    assert (whole.class_name, int(whole.mask.sum())) == ("scattered", 4)


def test_labelled_volume_without_csv_keeps_its_labels(tmp_path):
    values = np.zeros((6, 10, 12), np.uint8)
    values[0, 0, 0] = values[5, 9, 11] = 2
    values[3, 3, 3] = 5
    write_image(tmp_path / "a.nrrd", Volume(values, AXIAL))
    items = read(tmp_path, scan())
    assert [(item.label, item.class_name) for item in items] == [(2, "lesion"), (5, "lesion")]


def test_boxes_without_masks_go_through_the_csv_alone(tmp_path):
    volume = scan(oblique())
    write_labels(tmp_path, "a", volume, [solid(1, (0, 0, 0), (1, 1, 1))])
    box = Box(0.25, 1.1, 2.123456789, 2.75, 5.0, 11.9)
    given_items = [Annotation(3, "cyst", box, None, True)]
    write_labels(tmp_path, "a", volume, given_items)
    assert not (tmp_path / "a.nii.gz").exists()
    assert read(tmp_path, volume) == given_items


def test_boxes_in_mm_alone_find_their_voxels(tmp_path):
    volume = scan(AXIAL @ np.diag([1.0, -1, 1, 1]))
    box = Box(1, 2, 3, 4, 5, 6)
    mm = box_to_patient(volume.affine, box)
    names = ",".join(vars(mm))
    values = ",".join(str(value) for value in vars(mm).values())
    (tmp_path / "a.csv").write_text(f"label,class,{names}\n1,x,{values}\n")
    (item,) = read(tmp_path, volume)
    np.testing.assert_allclose([item.box.lower, item.box.upper], [box.lower, box.upper])


def test_csv_without_boxes_or_with_boxes_outside_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("label,class\n1,x\n")
    with pytest.raises(InputError, match="needs a box"):
        read(tmp_path, scan())
    names = "slice_min,row_min,column_min,slice_max,row_max,column_max"
    (tmp_path / "a.csv").write_text(f"label,class,{names}\n1,x,7,1,1,8,2,2\n")
    with pytest.raises(InputError, match="inside the scan"):
        read(tmp_path, scan())


def test_two_label_volumes_of_one_case_are_refused(tmp_path):
    for suffix in (".nii.gz", ".mha"):
        write_image(tmp_path / f"a{suffix}", scan())
    with pytest.raises(InputError, match="one label volume"):
        read(tmp_path, scan())


def test_the_smaller_of_two_overlapping_lesions_stays_whole(tmp_path):
    volume = scan()
    items = [solid(1, (1, 1, 1), (1, 1, 2)), solid(2, (0, 0, 0), (4, 4, 4))]
    write_labels(tmp_path, "a", volume, items)
    assert [int(item.mask.sum()) for item in read(tmp_path, volume)] == [2, 62]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([solid(1, (0, 0, 0), (1, 1, 1)), solid(1, (2, 2, 2), (1, 1, 1))], "differ"),
        ([solid(70000, (0, 0, 0), (1, 1, 1))], "at most 65535"),
        ([solid(1, (0, 0, 0), (1, 1, 1), name="Background")], "background"),
        ([solid(1, (0, 0, 0), (1, 1, 1), name=" ")], "class must have a name"),
        ([solid(1, (5, 9, 11), (2, 2, 2))], "inside the scan"),
        ([solid(1, (0, 0, 0), (1, 1, 1)), solid(2, (0, 0, 0), (1, 1, 1))], "voxel of its own"),
        ([lesion(1, (0, 0, 0), np.zeros((2, 2, 2), bool))], "voxel of its own"),
        (
            [solid(1, (0, 0, 0), (1, 1, 1)), Annotation(2, "x", Box(1, 1, 1, 2, 2, 2))],
            "all have masks or all be bare",
        ),
    ],
)
def test_annotations_that_cannot_be_read_back_are_not_written(tmp_path, items, message):
    with pytest.raises(InputError, match=message):
        write_labels(tmp_path, "a", scan(), items)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_made(tmp_path: Path):
    write_labels(tmp_path / "new" / "labels", "a", scan(), [])
    assert read(tmp_path / "new" / "labels", replace(scan())) == []
