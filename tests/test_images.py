"""Volume files: values and places survive, other readers agree, hostile files are refused."""

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK

from medvision.errors import InputError, UsageError
from medvision.geometry import affine_from_nifti, affine_to_nifti
from medvision.sample_data.phantoms import ORIENTATIONS, make_phantom
from medvision.scans.images import image_suffix, read_image, write_image
from medvision.scans.volume import Volume

SUFFIXES = [".nii", ".nii.gz", ".mha", ".nrrd"]


def phantom_volume(orientation="oblique", shape=(5, 14, 10)):
    return make_phantom(shape, orientation=orientation, n_lesions=0).volume


def nifti(path, data, affine=None, **codes):
    affine = np.diag([0.7, 0.8, 2.5, 1]) if affine is None else affine
    image = nibabel.Nifti1Image(data, affine)
    for name, code in codes.items():
        getattr(image, f"set_{name}")(affine, code=code)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_round_trip_keeps_values_and_places(tmp_path, suffix, orientation):
    volume = phantom_volume(orientation)
    write_image(tmp_path / f"a.b{suffix}", volume)
    read = read_image(tmp_path / f"a.b{suffix}")
    assert read.array.dtype == np.int16
    assert (read.array == volume.array).all()
    corner = [4, 13, 9]
    assert read.index_to_patient(corner) == pytest.approx(volume.index_to_patient(corner), abs=1e-3)
    assert read.affine == pytest.approx(volume.affine, abs=1e-3)
    assert read.notes == ()
    assert read.source.path == tmp_path / f"a.b{suffix}"
    assert [path.name for path in tmp_path.iterdir()] == [f"a.b{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_simpleitk_sees_the_same_voxels_at_the_same_places(tmp_path, suffix, orientation):
    volume = phantom_volume(orientation)
    write_image(tmp_path / f"a{suffix}", volume)
    image = SimpleITK.ReadImage(str(tmp_path / f"a{suffix}"))
    assert (SimpleITK.GetArrayFromImage(image) == volume.array).all()
    for index in ([0, 0, 0], [4, 13, 9], [1, 2, 3]):
        expected = image.TransformIndexToPhysicalPoint(index[::-1])
        assert volume.index_to_patient(index) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_simpleitk_are_read_at_the_same_places(tmp_path, suffix):
    volume = phantom_volume("oblique")
    image = SimpleITK.GetImageFromArray(volume.array)
    image.SetOrigin(volume.affine[:3, 3].tolist())
    image.SetSpacing(volume.spacing_mm[::-1])
    directions = volume.affine[:3, :3] / volume.spacing_mm
    image.SetDirection(directions[:, ::-1].ravel().tolist())
    SimpleITK.WriteImage(image, str(tmp_path / f"a{suffix}"))
    read = read_image(tmp_path / f"a{suffix}")
    assert (read.array == volume.array).all()
    assert read.affine == pytest.approx(volume.affine, abs=1e-3)


def test_header_and_raw_file_are_read(tmp_path):
    volume = phantom_volume("axial")
    image = SimpleITK.GetImageFromArray(volume.array)
    SimpleITK.WriteImage(image, str(tmp_path / "a.mhd"))
    assert (read_image(tmp_path / "a.mhd").array == volume.array).all()


def test_nibabel_sees_the_same_affine(tmp_path):
    volume = phantom_volume("mirrored")
    write_image(tmp_path / "a.nii.gz", volume)
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert image.affine == pytest.approx(affine_to_nifti(volume.affine), abs=1e-4)
    assert image.get_qform() == pytest.approx(affine_to_nifti(volume.affine), abs=1e-3)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
    assert (volume.array == np.asarray(image.dataobj).T).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_single_slice(tmp_path, suffix):
    volume = phantom_volume("flipped", (1, 14, 10))
    write_image(tmp_path / f"a{suffix}", volume)
    read = read_image(tmp_path / f"a{suffix}")
    assert read.shape == (1, 14, 10)
    assert read.affine == pytest.approx(volume.affine, abs=1e-3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sheared_volumes_keep_their_places(tmp_path, suffix):
    affine = phantom_volume("axial").affine.copy()
    affine[1, 0] = 0.5
    volume = Volume(phantom_volume().array, affine)
    write_image(tmp_path / f"a{suffix}", volume)
    assert read_image(tmp_path / f"a{suffix}").affine == pytest.approx(affine, abs=1e-3)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("written", "read"),
    [
        (np.uint8, np.int16),
        (np.int16, np.int16),
        (np.int32, np.int32),
        (np.float32, np.float32),
        (np.float64, np.float32),
        (np.int64, np.int32),
        (bool, np.int16),
    ],
)
def test_types(tmp_path, suffix, written, read):
    array = np.arange(24).reshape(2, 3, 4).astype(written)
    if written in (np.int32, np.int64):
        array = array * 5000
    write_image(tmp_path / f"a{suffix}", Volume(array, np.eye(4)))
    volume = read_image(tmp_path / f"a{suffix}")
    assert volume.array.dtype == read
    assert (volume.array == array).all()


def test_labels_above_32767_stay_exact(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", np.full((4, 3, 2), 65535, np.uint16))
    assert (read_image(path).array == 65535).all()


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"), [(1, -1024, np.int16), (0.5, 0.25, np.float32)]
)
def test_nifti_scaling_is_applied(tmp_path, slope, intercept, dtype):
    stored = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    image = nibabel.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = np.array([slope, intercept], "<f4").tobytes()
    raw[352:] = stored.tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(bytes(raw))
    volume = read_image(tmp_path / "a.nii")
    assert volume.array.dtype == dtype
    assert pytest.approx(stored * slope + intercept) == volume.array.T


def test_nifti_sform_goes_before_qform_and_a_conflict_is_said(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 3, 2), np.int16), None)
    sform, qform = np.diag([1.0, 2, 3, 1]), np.diag([1.0, 2, 3, 1])
    sform[:3, 3], qform[:3, 3] = (10, 20, 30), (-10, 0, 0)
    image.set_sform(sform, code=2)
    image.set_qform(qform, code=1)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_image(tmp_path / "a.nii")
    assert volume.affine == pytest.approx(affine_from_nifti(sform))
    assert "disagree" in volume.notes[0]


def test_nifti_qform_alone(tmp_path):
    affine = affine_to_nifti(phantom_volume("oblique").affine)
    path = nifti(tmp_path / "a.nii", np.zeros((4, 3, 2), np.int16), affine, sform=0, qform=1)
    volume = read_image(path)
    assert volume.affine == pytest.approx(affine_from_nifti(affine), abs=1e-3)
    assert volume.notes == ()


def test_nifti_without_any_place_is_said(tmp_path):
    path = nifti(tmp_path / "a.nii", np.zeros((4, 3, 2), np.int16), sform=0, qform=0)
    volume = read_image(path)
    assert volume.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    assert "left/right are unknown" in volume.notes[0]


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1e-3), ("meter", 1e3), ("mm", 1)])
def test_nifti_lengths_become_mm(tmp_path, unit, factor):
    image = nibabel.Nifti1Image(np.zeros((4, 3, 2), np.int16), np.diag([0.7, 0.8, 2.5, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_image(tmp_path / "a.nii")
    assert volume.spacing_mm == pytest.approx(np.array([2.5, 0.8, 0.7]) * factor)
    assert bool(volume.notes) == (factor != 1)


@pytest.mark.parametrize("shape", [(4, 3, 2, 1), (4, 3, 2, 1, 1), (4, 3)])
def test_empty_axes_are_dropped_and_2d_is_one_slice(tmp_path, shape):
    data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    volume = read_image(nifti(tmp_path / "a.nii.gz", data))
    assert volume.shape == ((2 if len(shape) > 2 else 1), 3, 4)
    assert (volume.array.T.ravel() == data.ravel()).all()


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_itk_files_of_two_and_four_dimensions(tmp_path, suffix):
    flat = np.arange(12, dtype=np.int16).reshape(3, 4)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(flat), str(tmp_path / f"flat{suffix}"))
    assert (read_image(tmp_path / f"flat{suffix}").array[0] == flat).all()
    four = SimpleITK.GetImageFromArray(
        np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4), isVector=False
    )
    SimpleITK.WriteImage(four, str(tmp_path / f"four{suffix}"))
    assert read_image(tmp_path / f"four{suffix}").array.ravel().tolist() == list(range(24))


def test_time_points_and_channels_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"one 3-D image.*\(4, 3, 2, 5\)"):
        read_image(nifti(tmp_path / "a.nii", np.zeros((4, 3, 2, 5), np.int16)))
    colour = SimpleITK.GetImageFromArray(np.zeros((2, 3, 4, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(colour, str(tmp_path / "a.mha"))
    with pytest.raises(InputError, match="one 3-D image"):
        read_image(tmp_path / "a.mha")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused(tmp_path, suffix, value):
    array = np.zeros((2, 3, 4), np.float32)
    array[1, 1, 1] = value
    write_image(tmp_path / f"a{suffix}", Volume(array, np.eye(4)))
    with pytest.raises(InputError, match="1 are NaN or infinite"):
        read_image(tmp_path / f"a{suffix}")


def test_complex_is_refused(tmp_path):
    with pytest.raises(InputError, match="real numbers"):
        read_image(nifti(tmp_path / "a.nii", np.zeros((4, 3, 2), np.complex64)))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_declared_size_that_cannot_be_meant_is_refused_before_it_is_read(tmp_path, suffix):
    nifti(tmp_path / "a.nii", np.zeros((4, 3, 2), np.int16))
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[42:48] = np.array([30000, 30000, 3000], "<i2").tobytes()
    raw = bytes(raw) if suffix == ".nii" else gzip.compress(bytes(raw))
    (tmp_path / f"b{suffix}").write_bytes(raw)
    with pytest.raises(InputError, match="the header declares 5400000000000"):
        read_image(tmp_path / f"b{suffix}")


def test_a_declared_size_out_of_proportion_is_refused(tmp_path):
    text = (
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 900 900 900\nencoding: gzip\nendian: little\n"
        "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
        "space origin: (0,0,0)\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(text.encode() + gzip.compress(bytes(100)))
    with pytest.raises(InputError, match="the header declares 1458000000"):
        read_image(tmp_path / "a.nrrd")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["half", "junk", "empty"])
def test_damaged_files_are_refused_by_name(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    write_image(path, phantom_volume(shape=(9, 40, 30)))
    content = path.read_bytes()
    half = content[: len(content) // 2]
    path.write_bytes({"half": half, "junk": b"nothing of the kind " * 50, "empty": b""}[damage])
    with pytest.raises(InputError) as caught:
        read_image(path)
    assert caught.value.where == str(path)


def test_wrong_names(tmp_path):
    with pytest.raises(UsageError):
        read_image(tmp_path / "missing.nii")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError):
        read_image(tmp_path / "a.txt")
    for name in ("a.txt", "a.mhd", "a"):
        with pytest.raises(UsageError):
            write_image(tmp_path / name, phantom_volume())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_image(path, phantom_volume())
    before = path.read_bytes()
    monkeypatch.setattr(nibabel, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_image(path, phantom_volume("axial"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_image_suffix(tmp_path):
    assert image_suffix(tmp_path / "A.NII.GZ") == ".nii.gz"
    assert image_suffix(tmp_path / "a.b.mha") == ".mha"
    assert image_suffix(tmp_path / "a.gz") is None
