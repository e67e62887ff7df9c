"""Finding and reading scans: by content, in any folder, with one bad file never in the way."""

import subprocess
import sys
from pathlib import Path

import pydicom
import pytest

from medvision.errors import InputError, UsageError
from medvision.outputs.dicom_ct import write_ct_series
from medvision.sample_data.phantoms import make_phantom, write_phantom_dataset
from medvision.scans.images import write_image
from medvision.scans.load import find_scans, read_reference, read_scan

VOLUME = make_phantom((4, 14, 10), orientation="oblique", n_lesions=0).volume


def write_series(folder, number=1, slices=4, patient_id="p", description="Chest"):
    volume = make_phantom((slices, 14, 10), n_lesions=0, seed=number).volume
    return write_ct_series(
        volume,
        folder,
        patient_id=patient_id,
        series_description=description,
        series_number=number,
    )


def test_import_is_light():
    code = (
        "import sys; import medvision.scans.load; "
        "print({'torch','pydicom','nibabel','SimpleITK','pandas','scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_kind_is_found(tmp_path):
    write_image(tmp_path / "one.nii.gz", VOLUME)
    write_image(tmp_path / "deep" / "two.mha", VOLUME)
    write_image(tmp_path / "three.b.nrrd", VOLUME)
    files = write_series(tmp_path / "dicom", patient_id="SECRET-17")
    uid = pydicom.dcmread(files[0]).SeriesInstanceUID
    search = find_scans(tmp_path)
    found = {one.case_id: one for one in search}
    assert len(search) == 4
    assert {case_id: one.kind for case_id, one in found.items()} == {
        "one": "nifti",
        "two": "metaimage",
        "three.b": "nrrd",
        uid: "dicom",
    }
    series = found[uid]
    assert (series.path, series.n_files) == (tmp_path / "dicom", 4)
    assert (series.modality, series.description) == ("CT", "Chest")
    assert series.series_instance_uid == uid
    assert series.patient_id == "SECRET-17"
    assert "SECRET-17" not in repr(search)
    assert search.skipped == ()


def test_references_can_be_read(tmp_path):
    write_image(tmp_path / "one.nii.gz", VOLUME)
    write_series(tmp_path / "flat", 1)
    for path in write_series(tmp_path / "other", 2, slices=6):
        path.rename(tmp_path / "flat" / f"other_{path.name}")
    for reference in find_scans(tmp_path):
        volume = read_reference(reference)
        again = read_scan(reference.path, reference.series_instance_uid or None)
        assert (volume.array == again.array).all()
        if reference.kind == "dicom":
            assert volume.shape[0] == reference.n_files
            assert volume.source.series_instance_uid == reference.series_instance_uid


def test_bad_files_never_stop_the_rest(tmp_path):
    files = write_series(tmp_path / "good")
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "bad.dcm").write_bytes(files[0].read_bytes()[:300])
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".hidden").write_text("x")
    search = find_scans(tmp_path)
    assert [one.kind for one in search.references] == ["dicom"]
    assert sorted(path.name for path, _ in search.skipped) == ["bad.dcm", "dangling", "notes.txt"]
    assert all(reason for _, reason in search.skipped)


def test_label_folder_holds_no_scans(tmp_path):
    case_ids = write_phantom_dataset(tmp_path, 2, shape=(8, 64, 48), n_lesions=1)
    search = find_scans(tmp_path)
    assert [one.case_id for one in search] == case_ids
    assert {skip.reason for skip in search.skipped} == {"label folder", "not a DICOM file"}
    assert [one.case_id for one in find_scans(tmp_path / "scans")] == case_ids


def test_links_that_go_in_circles_end(tmp_path):
    write_image(tmp_path / "data" / "one.nii.gz", VOLUME)
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "data")
    assert [one.case_id for one in find_scans(tmp_path / "root")] == ["one"]


def test_find_scans_of_a_single_file(tmp_path):
    files = write_series(tmp_path)
    assert [one.n_files for one in find_scans(files[0])] == [1]


@pytest.mark.parametrize("name", ["one.nii", "one.nii.gz", "one.mha", "one.nrrd"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_volume_file_or_its_folder_is_read(tmp_path, name, as_folder):
    write_image(tmp_path / name, VOLUME)
    volume = read_scan(tmp_path if as_folder else str(tmp_path / name))
    assert (volume.array == VOLUME.array).all()
    assert volume.affine == pytest.approx(VOLUME.affine, abs=1e-3)


def test_a_series_folder_is_read_with_its_junk(tmp_path):
    write_series(tmp_path / "a" / "b")
    (tmp_path / "a" / "readme.txt").write_text("x" * 500)
    write_image(tmp_path / "a" / "x.nii", VOLUME)
    volume = read_scan(tmp_path)
    assert volume.shape == (4, 14, 10)
    assert volume.notes == (
        "Left aside 1 volume files beside the DICOM files.",
        "Left out 1 x not a DICOM file.",
    )


def test_series_are_chosen_or_asked_about(tmp_path):
    write_series(tmp_path / "a", 1, description="Lung")
    write_series(tmp_path / "b", 2, description="Soft")
    with pytest.raises(InputError, match="One series must be chosen"):
        read_scan(tmp_path)
    first = read_scan(tmp_path, series=1)
    assert (first.array == read_scan(tmp_path, series="Lung").array).all()
    assert (first.array == read_scan(tmp_path, series=first.source.series_instance_uid).array).all()
    assert (first.array != read_scan(tmp_path, series="Soft").array).any()


def test_localizers_are_left_out_and_said(tmp_path):
    write_series(tmp_path / "ct", 1)
    for path in write_series(tmp_path / "scout", 2, slices=9, description="Scout"):
        dataset = pydicom.dcmread(path)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        dataset.save_as(path)
    volume = read_scan(tmp_path)
    assert volume.shape[0] == 4
    assert "Left out 1 x series 2 'Scout': 9 x localizer." in volume.notes
    with pytest.raises(InputError, match="0 series match 'Scout'"):
        read_scan(tmp_path, series="Scout")


def test_one_dicom_file_is_one_slice(tmp_path):
    files = write_series(tmp_path)
    assert read_scan(files[2]).shape == (1, 14, 10)


@pytest.mark.parametrize("read", [find_scans, read_scan])
def test_a_path_that_is_not_there_is_a_wrong_call(tmp_path, read):
    with pytest.raises(UsageError, match="must exist"):
        read(tmp_path / "missing")


def test_a_folder_without_scan_says_what_was_looked_at(tmp_path):
    for name in ("a.txt", "b.txt", "c.csv", "d"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(
        InputError, match=r"4 files \(2 \.txt, 1 \.csv, 1 without ending\)"
    ) as caught:
        read_scan(tmp_path)
    assert "4 x not a DICOM file" in caught.value.why
    assert len(find_scans(tmp_path)) == 0


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="looked at 0 files"):
        read_scan(tmp_path)
    assert find_scans(tmp_path).references == ()


def test_several_volume_files_are_asked_about(tmp_path):
    for name in ("a.nii", "b.mha"):
        write_image(tmp_path / name, VOLUME)
    with pytest.raises(InputError, match="holds 2 volume files") as caught:
        read_scan(tmp_path)
    assert "a.nii, b.mha" in caught.value.why


def test_progress_is_told(tmp_path):
    write_series(tmp_path)
    reports = []
    read_scan(tmp_path, on_progress=reports.append)
    assert reports[-1].done == reports[-1].total == 4


def test_paths_may_be_relative(tmp_path, monkeypatch):
    write_series(tmp_path / "ct")
    monkeypatch.chdir(tmp_path)
    assert read_scan("ct").shape == (4, 14, 10)
    assert [one.path for one in find_scans(".")] == [Path("ct")]
