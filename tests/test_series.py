"""Series: found by content, grouped, ordered in space, chosen or asked about."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medvision.errors import InputError
from medvision.outputs.dicom_ct import write_ct_series
from medvision.sample_data.phantoms import ORIENTATIONS, make_phantom
from medvision.scans.instance import Instance, looks_like_dicom, read_instance
from medvision.scans.series import (
    Series,
    choose_series,
    find_instances,
    group_series,
    order_instances,
)


def write_series(
    folder, *, slices=4, orientation="axial", number=1, description="Chest", patient="p"
):
    volume = make_phantom((slices, 8, 6), orientation=orientation, n_lesions=0, seed=number).volume
    return write_ct_series(
        volume, folder, patient_id=patient, series_description=description, series_number=number
    )


def change(path, **attributes):
    dataset = pydicom.dcmread(path)
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


def series_below(folder):
    instances, _ = find_instances(
        sorted(path for path in Path(folder).rglob("*") if path.is_file())
    )
    return group_series(instances)


def test_header_fields(tmp_path):
    path = write_series(tmp_path, number=7)[0]
    dataset, instance = pydicom.dcmread(path), read_instance(path)
    assert instance.sop_instance_uid == dataset.SOPInstanceUID
    assert instance.series_instance_uid == dataset.SeriesInstanceUID
    assert instance.study_instance_uid == dataset.StudyInstanceUID
    assert instance.frame_of_reference_uid == dataset.FrameOfReferenceUID
    assert (instance.rows, instance.columns) == (8, 6)
    assert (instance.series_number, instance.modality) == ("7", "CT")
    assert instance.image_position == tuple(dataset.ImagePositionPatient)
    assert instance.image_type == ("DERIVED", "PRIMARY", "AXIAL")


def test_patient_id_does_not_show(tmp_path):
    instance = read_instance(write_series(tmp_path, patient="SECRET-17")[0])
    assert instance.patient_id == "SECRET-17"
    assert "SECRET-17" not in repr(instance)


def test_dicom_is_known_by_content_not_by_name(tmp_path):
    source = write_series(tmp_path / "a", slices=3)
    shutil.move(source[0], tmp_path / "a" / "no_ending")
    shutil.move(source[1], tmp_path / "a" / "odd.txt")
    (tmp_path / "a" / "junk.dcm").write_bytes(b"not at all DICOM" * 20)
    (tmp_path / "a" / "empty.dcm").write_bytes(b"")
    instances, skipped = find_instances(sorted((tmp_path / "a").iterdir()))
    assert len(instances) == 3
    assert sorted(skip.path.name for skip in skipped) == ["empty.dcm", "junk.dcm"]
    assert {skip.reason for skip in skipped} == {"not a DICOM file"}


def test_file_without_preamble_is_read(tmp_path):
    path = write_series(tmp_path, slices=1)[0]
    dataset = pydicom.dcmread(path)
    bare = tmp_path / "bare"
    pydicom.dcmwrite(bare, dataset_without_meta(dataset), implicit_vr=True, little_endian=True)
    assert bare.read_bytes()[128:132] != b"DICM"
    assert looks_like_dicom(bare)
    assert read_instance(bare).sop_instance_uid == dataset.SOPInstanceUID


def dataset_without_meta(dataset):
    bare = pydicom.Dataset()
    bare.update(dataset)
    return bare


def test_damaged_and_seriesless_files_are_skipped_with_a_reason(tmp_path):
    first, second, third = write_series(tmp_path, slices=3)
    first.write_bytes(first.read_bytes()[:200])
    dataset = pydicom.dcmread(second)
    del dataset.SeriesInstanceUID
    dataset.save_as(second)
    instances, skipped = find_instances([first, second, third, tmp_path / "missing"])
    assert [instance.path for instance in instances] == [third]
    assert len(skipped) == 3
    assert "belongs to no series" in skipped[1].reason
    assert "cannot be opened" in skipped[2].reason


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_slices_are_ordered_in_space_not_by_name_or_number(tmp_path, orientation):
    files = write_series(tmp_path / "in", slices=7, orientation=orientation)
    shuffled = np.random.default_rng(1).permutation(len(files))
    for index, file in zip(shuffled, files, strict=True):
        change(file, InstanceNumber=int(index) + 1)
        shutil.move(file, tmp_path / f"{index}.dcm")
    ordered = order_instances(find_instances(sorted(tmp_path.glob("*.dcm")))[0])
    along = [np.dot(one.image_position, one.normal) for one in ordered]
    assert np.diff(along) == pytest.approx([2.5] * 6)


def test_series_are_grouped_by_uid_and_what_is_no_slice_is_left_out(tmp_path):
    write_series(tmp_path / "a", number=1)
    write_series(tmp_path / "b", number=2, slices=2)
    for path in write_series(tmp_path / "c", number=3, slices=2, description="Scout"):
        change(path, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    change(write_series(tmp_path / "d", number=4, slices=1)[0], Modality="SEG")
    change(write_series(tmp_path / "e", number=5, slices=1)[0], SamplesPerPixel=3)
    change(write_series(tmp_path / "f", number=6, slices=1)[0], NumberOfFrames=9)
    report = write_series(tmp_path / "g", number=7, slices=1)[0]
    dataset = pydicom.dcmread(report)
    del dataset.Rows
    change(report)
    dataset.save_as(report)
    series, skipped = series_below(tmp_path)
    assert sorted(len(one.instances) for one in series) == [2, 4]
    reasons = {skip.path.name: skip.reason for skip in skipped}
    assert reasons["c"] == "series 3 'Scout': 2 x localizer"
    assert "SEG without an image" in reasons["d"]
    assert "colour" in reasons["e"]
    assert "multi-frame" in reasons["f"]
    assert "without an image" in reasons["g"]


def test_localizers_inside_a_series_are_left_out(tmp_path):
    files = write_series(tmp_path, slices=4)
    change(files[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series, skipped = series_below(tmp_path)
    assert [len(one.instances) for one in series] == [3]
    assert len(skipped) == 1


def test_the_only_series_is_taken(tmp_path):
    write_series(tmp_path)
    series, _ = series_below(tmp_path)
    assert choose_series(series, None, tmp_path) == (series[0], ())


@pytest.mark.parametrize("wanted", ["2", 2, "thin", " THIN ", "uid"])
def test_a_series_is_chosen_by_uid_number_or_description(tmp_path, wanted):
    write_series(tmp_path / "a", number=1, description="Thick")
    path = write_series(tmp_path / "b", number=2, description="Thin")[0]
    uid = read_instance(path).series_instance_uid
    chosen, notes = choose_series(
        series_below(tmp_path)[0], uid if wanted == "uid" else wanted, tmp_path
    )
    assert chosen.series_instance_uid == uid
    assert notes == ()


@pytest.mark.parametrize("wanted", ["9", "Chest"])
def test_a_choice_that_fits_none_or_several_is_refused_with_a_list(tmp_path, wanted):
    write_series(tmp_path / "a", number=1)
    write_series(tmp_path / "b", number=2)
    with pytest.raises(InputError) as caught:
        choose_series(series_below(tmp_path)[0], wanted, tmp_path)
    assert "series 1 'Chest': CT, 4 slices, 2.25." in str(caught.value)
    assert "series 2 'Chest': CT, 4 slices, 2.25." in str(caught.value)


def test_the_largest_axial_ct_is_taken_and_said(tmp_path):
    write_series(tmp_path / "a", number=1, slices=4, description="Thick")
    write_series(tmp_path / "b", number=2, slices=9, description="Thin")
    write_series(tmp_path / "c", number=3, slices=20, orientation="coronal", description="MPR")
    chosen, notes = choose_series(series_below(tmp_path)[0], None, tmp_path)
    assert chosen.first.series_description == "Thin"
    assert "'Thick'" in notes[0]
    assert "'MPR'" in notes[0]


def test_two_equally_large_series_are_asked_about(tmp_path):
    write_series(tmp_path / "a", number=1, description="Lung")
    write_series(tmp_path / "b", number=2, description="Soft")
    with pytest.raises(InputError, match="Several axial CT series") as caught:
        choose_series(series_below(tmp_path)[0], None, tmp_path)
    assert "'Lung'" in caught.value.why
    assert "'Soft'" in caught.value.why


def test_series_of_two_patients_are_never_chosen_from(tmp_path):
    write_series(tmp_path / "a", number=1, slices=4, patient="one")
    write_series(tmp_path / "b", number=2, slices=9, patient="two")
    with pytest.raises(InputError, match="more than one patient") as caught:
        choose_series(series_below(tmp_path)[0], None, tmp_path)
    assert "one" not in caught.value.why.split()


def test_several_series_without_axial_ct_are_asked_about(tmp_path):
    for number in (1, 2):
        for path in write_series(tmp_path / str(number), number=number, slices=3 + number):
            change(path, Modality="MR")
    with pytest.raises(InputError, match="2 series could be meant"):
        choose_series(series_below(tmp_path)[0], None, tmp_path)


def test_a_screenshot_without_place_does_not_compete(tmp_path):
    write_series(tmp_path / "a", number=1)
    dataset = pydicom.dcmread(write_series(tmp_path / "b", number=2, slices=1)[0])
    del dataset.ImagePositionPatient
    dataset.save_as(tmp_path / "b" / "IM0001.dcm")
    chosen, notes = choose_series(series_below(tmp_path)[0], None, tmp_path)
    assert chosen.first.series_number == "1"
    assert "left aside series 2" in notes[0]


def test_folder_of_a_series_in_two_folders_is_their_parent():
    one = Instance(Path("/x/a/1"), "1.1", "1", rows=1, columns=1)
    series = Series((one, replace(one, path=Path("/x/b/2"))))
    assert series.folder == Path("/x")
