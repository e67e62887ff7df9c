"""Dataset folders of every layout: what is a case, what is unlabelled, what is wrong."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medvision.datasets.discover import find_cases, find_dataset_scans, load_case
from medvision.errors import InputError, UsageError
from medvision.geometry import Box, make_affine
from medvision.labels.annotation import Annotation
from medvision.labels.masks import write_labels
from medvision.scans.images import write_image
from medvision.scans.volume import Volume

AFFINE = make_affine((-30, -40, 50), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2.5, 0.7, 0.9))
VOLUME = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE)
LESION = Annotation(1, "nodule", Box(1, 1, 1, 2, 2, 3), np.ones((1, 1, 2), bool))


def make_scan(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    write_image(folder / name, VOLUME)


def make_series(folder, patient="P1", slices=3):
    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for index in range(slices):
        data = pydicom.Dataset()
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
        data.StudyInstanceUID, data.SeriesInstanceUID = study, series
        data.FrameOfReferenceUID, data.PatientID, data.Modality = frame, patient, "CT"
        data.InstanceNumber, data.SeriesNumber, data.SeriesDescription = index + 1, 4, "THORAX"
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.Rows, data.Columns, data.PixelSpacing, data.SliceThickness = 4, 5, [0.7, 0.9], 2.5
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [-30, -40, 50 + 2.5 * index]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = VOLUME.array[index].astype("<i2").tobytes()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return str(series)


@pytest.mark.parametrize("folder", ["scans", "images"])
def test_labelled_healthy_and_unlabelled_scans_are_told_apart(tmp_path, folder):
    for name in ("c.nii.gz", "a.mha", "b.nrrd"):
        make_scan(tmp_path / folder, name)
    write_labels(tmp_path / "labels", "a", VOLUME, [LESION])
    write_labels(tmp_path / "labels", "b", VOLUME, [])
    dataset = find_cases(tmp_path)
    assert [case.case_id for case in dataset.cases] == ["a", "b"]
    assert dataset.unlabelled == ("c",)
    assert dataset.problems == ()
    sick, healthy = (load_case(case) for case in dataset.cases)
    assert [item.class_name for item in sick.annotations] == ["nodule"]
    assert healthy.annotations == ()
    np.testing.assert_array_equal(sick.volume.array, VOLUME.array)


def test_dicom_series_are_cases_with_their_patient(tmp_path):
    uids = {make_series(tmp_path / "scans" / name, name) for name in ("P1", "P2")}
    for uid in uids:
        write_labels(tmp_path / "labels", uid, VOLUME, [LESION])
    dataset = find_cases(tmp_path)
    assert {case.case_id for case in dataset.cases} == uids
    assert {case.patient_id for case in dataset.cases} == {"P1", "P2"}
    assert dataset.problems == ()
    loaded = load_case(dataset.cases[0])
    np.testing.assert_allclose(loaded.volume.affine, AFFINE)
    assert loaded.annotations[0].box == LESION.box


def test_patient_ids_are_not_printed(tmp_path):
    uid = make_series(tmp_path / "scans" / "one", "Doe^Jane")
    write_labels(tmp_path / "labels", uid, VOLUME, [])
    assert "Doe" not in repr(find_cases(tmp_path))


def test_one_patient_id_for_all_is_pointed_out(tmp_path):
    uids = [make_series(tmp_path / "scans" / name, "ANON") for name in "ab"]
    for uid in uids:
        write_labels(tmp_path / "labels", uid, VOLUME, [])
    ((where, sentence),) = find_cases(tmp_path).problems
    assert where == "cases.csv"
    assert "same PatientID" in sentence
    assert "ANON" not in sentence
    (tmp_path / "cases.csv").write_text(f"case_id,patient_id\n{uids[0]},x\n{uids[1]},y\n")
    assert find_cases(tmp_path).problems == ()


def test_cases_csv_gives_patients_and_unknown_ids_are_problems(tmp_path):
    for name in ("a", "b", "c"):
        make_scan(tmp_path / "scans", f"{name}.nii.gz")
        write_labels(tmp_path / "labels", name, VOLUME, [])
    (tmp_path / "cases.csv").write_text("case_id,patient_id\na,p\nb,p\nzz,p\n")
    dataset = find_cases(tmp_path)
    assert [case.patient_id for case in dataset.cases] == ["p", "p", "c"]
    assert dataset.problems == (("zz", "cases.csv names a case that has no scan."),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,patient\na,p\n", "columns case_id and patient_id"),
        ("", "columns case_id and patient_id"),
        ("case_id,patient_id\na,p\na,q\n", "a comes twice"),
    ],
)
def test_a_wrong_cases_csv_is_refused(tmp_path, text, message):
    make_scan(tmp_path / "scans", "a.nii.gz")
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        find_cases(tmp_path)


def test_labels_without_a_scan_are_problems(tmp_path):
    make_scan(tmp_path / "scans", "a.nii.gz")
    write_labels(tmp_path / "labels", "A", VOLUME, [LESION])
    dataset = find_cases(tmp_path)
    assert dataset.unlabelled == ("a",)
    assert [path.rsplit("/", 1)[1] for path, _ in dataset.problems] == ["A.csv", "A.nii.gz"]


def test_two_scans_of_one_name_are_refused(tmp_path):
    make_scan(tmp_path / "scans" / "one", "a.nii.gz")
    make_scan(tmp_path / "scans" / "two", "a.mha")
    with pytest.raises(InputError, match=r"a is that of .*a\.nii\.gz and .*a\.mha"):
        find_cases(tmp_path)


def test_scans_at_top_level_with_a_label_folder(tmp_path):
    make_scan(tmp_path, "a.nii.gz")
    write_labels(tmp_path / "labels", "a", VOLUME, [LESION])
    dataset = find_cases(tmp_path)
    assert [case.case_id for case in dataset.cases] == ["a"]
    assert load_case(dataset.cases[0]).annotations[0].label == 1


def test_labels_beside_the_scans(tmp_path):
    make_scan(tmp_path, "a.nii.gz")
    assert find_cases(tmp_path).unlabelled == ("a",)
    (tmp_path / "a.csv").write_text("label,class\n")
    dataset = find_cases(tmp_path)
    assert [case.case_id for case in dataset.cases] == ["a"]
    assert load_case(dataset.cases[0]).annotations == ()


def test_a_label_volume_beside_its_dicom_series_is_no_scan(tmp_path):
    uid = make_series(tmp_path / "dicom")
    write_labels(tmp_path, uid, VOLUME, [LESION])
    (case,) = find_cases(tmp_path).cases
    assert case.scan.kind == "dicom"
    assert len(load_case(case).annotations) == 1


def test_a_single_file_finds_the_labels_of_its_dataset(tmp_path):
    make_scan(tmp_path / "scans", "a.nii.gz")
    make_scan(tmp_path / "scans", "b.nii.gz")
    write_labels(tmp_path / "labels", "a", VOLUME, [LESION])
    assert [case.case_id for case in find_cases(tmp_path / "scans" / "a.nii.gz").cases] == ["a"]


def test_files_that_are_no_scan_are_counted(tmp_path):
    make_scan(tmp_path / "scans", "a.nii.gz")
    for number in range(3):
        (tmp_path / "scans" / f"{number}.txt").write_text("no scan")
    references, problems = find_dataset_scans(tmp_path)
    assert len(references) == 1
    assert len(problems) == 1
    assert problems[0][1].startswith("3 left out")


def test_an_empty_folder_is_refused_and_a_missing_one_is_a_wrong_call(tmp_path):
    with pytest.raises(InputError, match="at least one scan"):
        find_cases(tmp_path)
    with pytest.raises(UsageError):
        find_cases(tmp_path / "nowhere")


def test_labels_that_do_not_fit_are_refused_at_loading(tmp_path):
    make_scan(tmp_path / "scans", "a.nii.gz")
    other = Volume(VOLUME.array, AFFINE @ np.diag([2.0, 1, 1, 1]))
    write_labels(tmp_path / "labels", "a", other, [LESION])
    (case,) = find_cases(tmp_path).cases
    with pytest.raises(InputError, match="scan's grid"):
        load_case(case)
    for path in (tmp_path / "labels").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="are gone"):
        load_case(case)


def test_finding_cases_needs_neither_torch_nor_sklearn():
    code = (
        "import sys, medvision.datasets.discover, medvision.datasets.split;"
        "print([name for name in ('torch', 'sklearn', 'scipy', 'nibabel') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
