"""CT series: valid by dciodvfy, and the same voxels at the same places in three other readers."""

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK

from medvision.errors import InputError, UsageError
from medvision.geometry import affine_from_nifti
from medvision.outputs.dicom_ct import write_ct_series
from medvision.sample_data.phantoms import (
    ORIENTATIONS,
    make_phantom,
    write_phantom_series,
)
from medvision.scans.load import read_scan
from medvision.scans.volume import ScanSource, Volume


def program(name):
    """Return a program that a wheel put beside Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check_same_places(volume, array, affine, tolerance_mm=1e-3):
    """Look up every voxel of ``volume`` by its place in another grid: same value, same place."""
    indices = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), axis=-1)
    mm = volume.index_to_patient(indices)
    other = Volume(array, affine)
    there = np.rint(other.patient_to_index(mm)).astype(int)
    assert there.min() >= 0
    assert (there < other.shape).all()
    assert np.abs(other.index_to_patient(there) - mm).max() < tolerance_mm
    assert (array[tuple(np.moveaxis(there, -1, 0))] == volume.array).all()


def cases():
    for orientation in ORIENTATIONS:
        yield pytest.param(((6, 14, 10), (2.5, 0.8, 0.7), orientation), id=orientation)
    yield pytest.param(((1, 14, 10), (2.5, 0.8, 0.7), "axial"), id="single slice")
    yield pytest.param(((1, 14, 10), (3.0, 0.8, 0.7), "oblique"), id="single oblique slice")
    yield pytest.param(((5, 9, 21), (7.5, 1 / 3, 0.123456789), "oblique"), id="odd spacing")


@pytest.fixture(params=list(cases()))
def written(request, tmp_path):
    shape, spacing, orientation = request.param
    phantom = make_phantom(shape, spacing, orientation, n_lesions=0)
    return phantom.volume, write_phantom_series(tmp_path / "ct", phantom)


def test_dciodvfy_finds_no_error(written):
    _, files = written
    for path in (files[0], files[-1]):
        done = subprocess.run([program("dciodvfy"), path], capture_output=True, text=True)
        report = done.stdout + done.stderr
        assert "CTImage" in report
        assert "Error" not in report


def test_dcentvfy_finds_the_series_consistent(written):
    _, files = written
    done = subprocess.run([program("dcentvfy"), *files], capture_output=True, text=True)
    assert "Error" not in done.stdout + done.stderr


def test_pydicom(written):
    volume, files = written
    for index, path in enumerate(files):
        dataset = pydicom.dcmread(path)
        hu = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
        assert (hu == volume.array[index]).all()
        row_step, column_step = dataset.PixelSpacing
        across, down = np.array(dataset.ImageOrientationPatient).reshape(2, 3)
        last = (
            np.array(dataset.ImagePositionPatient)
            + down * row_step * (dataset.Rows - 1)
            + across * column_step * (dataset.Columns - 1)
        )
        expected = volume.index_to_patient([index, dataset.Rows - 1, dataset.Columns - 1])
        assert last == pytest.approx(expected, abs=1e-3)


def test_simpleitk(written):
    volume, files = written
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent))
    assert len(names) == len(files)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(names)
    image = reader.Execute()
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, :3], affine[:3, 3] = directions[:, ::-1], image.GetOrigin()
    check_same_places(volume, SimpleITK.GetArrayFromImage(image), affine)


def test_dcm2niix(written, tmp_path):
    volume, files = written
    (tmp_path / "nii").mkdir()
    subprocess.run(
        [
            program("dcm2niix"),
            "-z",
            "n",
            "-b",
            "n",
            "-f",
            "a",
            "-o",
            tmp_path / "nii",
            files[0].parent,
        ],
        check=True,
        capture_output=True,
    )
    (path,) = (tmp_path / "nii").glob("*.nii")
    image = nibabel.load(path)
    array = np.asarray(image.dataobj).reshape((*image.shape, 1)[:3]).T
    check_same_places(volume, array, affine_from_nifti(image.affine))


def test_medvision(written):
    volume, files = written
    read = read_scan(files[0].parent)
    check_same_places(volume, read.array, read.affine)


def write(volume, folder, **options):
    return write_ct_series(volume, folder, **{"patient_id": "p", **options})


def small(orientation="axial", **source):
    volume = make_phantom((3, 8, 6), orientation=orientation, n_lesions=0).volume
    return Volume(volume.array, volume.affine, ScanSource(**source))


def test_what_is_written_in_each_file(tmp_path):
    files = write(small(), tmp_path, series_description="New", series_number=12)
    assert [path.name for path in files] == ["IM0001.dcm", "IM0002.dcm", "IM0003.dcm"]
    assert sorted(tmp_path.iterdir()) == files
    datasets = [pydicom.dcmread(path) for path in files]
    first = datasets[0]
    assert first.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    assert first.SOPClassUID == pydicom.uid.CTImageStorage
    assert [one.InstanceNumber for one in datasets] == [1, 2, 3]
    assert list(first.ImageType) == ["DERIVED", "PRIMARY", "AXIAL"]
    assert (first.RescaleSlope, first.RescaleIntercept, first.RescaleType) == (1, -1024, "HU")
    assert (first.SliceThickness, first.SpacingBetweenSlices) == (2.5, 2.5)
    assert (first.PatientID, first.SeriesDescription, first.SeriesNumber) == ("p", "New", 12)
    assert not first.PatientName
    assert not first.PatientBirthDate
    steps = np.diff([float(one.SliceLocation) for one in datasets])
    assert steps == pytest.approx([2.5, 2.5])
    assert len({one.SOPInstanceUID for one in datasets}) == 3
    assert len({one.SeriesInstanceUID for one in datasets}) == 1


def test_decimal_strings_fit_16_characters(tmp_path):
    phantom = make_phantom((2, 8, 6), (1 / 3, 1 / 7, 1e-3 / 3), "oblique", 0)
    for element in pydicom.dcmread(write(phantom.volume, tmp_path)[1]):
        if element.VR == "DS" and element.value is not None:
            values = element.value if element.VM > 1 else [element.value]
            assert max(len(str(value)) for value in values) <= 16


@pytest.mark.parametrize(
    ("low", "high", "signed"),
    [(-1024, 3071, 0), (-1024, 64511, 0), (-1025, 3071, 1), (-33792, 31743, 1)],
)
def test_the_whole_range_of_16_bits(tmp_path, low, high, signed):
    array = np.zeros((2, 3, 4), np.int32)
    array[0, 0, 0], array[1, 2, 3] = low, high
    files = write(Volume(array, small().affine), tmp_path)
    for index, path in enumerate(files):
        dataset = pydicom.dcmread(path)
        assert dataset.PixelRepresentation == signed
        assert (dataset.pixel_array.astype(int) - 1024 == array[index]).all()
    assert (read_scan(tmp_path).array == array).all()


@pytest.mark.parametrize(("low", "high"), [(-33793, 0), (0, 64512), (-1025, 31744)])
def test_values_beyond_16_bits_are_refused_not_clipped(tmp_path, low, high):
    array = np.array([low, high], np.int32).reshape(1, 1, 2)
    with pytest.raises(InputError, match="16 bits"):
        write(Volume(array, np.eye(4)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_whole_floats_are_written_and_others_refused(tmp_path):
    array = np.full((1, 2, 2), -3.0, np.float32)
    assert (read_scan(write(Volume(array, np.eye(4)), tmp_path / "a")[0]).array == -3).all()
    for bad in (0.5, np.nan):
        with pytest.raises(InputError, match="whole HU"):
            write(Volume(array + np.float32(bad), np.eye(4)), tmp_path / "b")


def test_uids_depend_on_the_content_alone(tmp_path):
    def uids(path):
        dataset = pydicom.dcmread(path)
        return [dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID]

    first = write(small(), tmp_path / "a")[0]
    assert write(small(), tmp_path / "b")[0].read_bytes() == first.read_bytes()
    others = [
        write(small("oblique"), tmp_path / "c")[0],
        write(small(), tmp_path / "d", patient_id="q")[0],
        write(small(), tmp_path / "e", series_description="x")[0],
        write(small(), tmp_path / "f", attributes={"DerivationDescription": "x"})[0],
    ]
    for other in others:
        assert not set(uids(other)) & set(uids(first))
    for uid in uids(first):
        assert uid.is_valid
        assert uid.startswith("2.25.")


def test_a_derived_series_stays_in_the_study_and_frame_of_its_source(tmp_path):
    volume = small(
        study_instance_uid="1.2.1",
        series_instance_uid="1.2.2",
        frame_of_reference_uid="1.2.3",
        sop_instance_uids=("1.2.4.1", "1.2.4.2", "1.2.4.3"),
    )
    derived = pydicom.dcmread(write(volume, tmp_path / "derived")[0])
    assert (derived.StudyInstanceUID, derived.FrameOfReferenceUID) == ("1.2.1", "1.2.3")
    assert derived.SeriesInstanceUID != "1.2.2"
    assert derived.SOPInstanceUID != "1.2.4.1"
    original = pydicom.dcmread(write(volume, tmp_path / "original", original=True)[1])
    assert original.SeriesInstanceUID == "1.2.2"
    assert original.SOPInstanceUID == "1.2.4.2"
    assert original.ImageType[0] == "ORIGINAL"


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    "extra", [{}, {"BodyPartExamined": "CHEST"}, {"BodyPartExamined": "KNEE", "Laterality": "L"}]
)
def test_series_with_few_attributes_is_valid_too(tmp_path, original, extra):
    files = write(small(), tmp_path, original=original, attributes=extra)
    done = subprocess.run([program("dciodvfy"), files[0]], capture_output=True, text=True)
    assert "Error" not in done.stdout + done.stderr


def test_extra_attributes(tmp_path):
    extra = {"BodyPartExamined": "CHEST", "PatientName": "Größe^Ä", "KVP": "120"}
    dataset = pydicom.dcmread(write(small(), tmp_path, attributes=extra)[2])
    assert dataset.BodyPartExamined == "CHEST"
    assert str(dataset.PatientName) == "Größe^Ä"
    assert dataset.KVP == 120


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "PixelData", "NoSuchKeyword"])
def test_attributes_that_may_not_be_set(tmp_path, keyword):
    with pytest.raises(UsageError, match=keyword):
        write(small(), tmp_path, attributes={keyword: "1"})


def test_an_old_series_is_not_mixed_with_a_new_one(tmp_path):
    write(small(), tmp_path)
    with pytest.raises(UsageError, match="without"):
        write(small("oblique"), tmp_path)


def test_sheared_axes_are_refused(tmp_path):
    affine = small().affine.copy()
    affine[1, 0] = 0.3
    with pytest.raises(InputError, match="right angles"):
        write(Volume(small().array, affine), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(tmp_path):
    reports = []
    write(small(), tmp_path, on_progress=reports.append)
    assert [(one.done, one.total) for one in reports] == [(1, 3), (2, 3), (3, 3)]
