"""DICOM -> Volume: values and geometry against SimpleITK, and every refusal with its reason."""

import shutil

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.pixels import get_decoder
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from medvision.errors import InputError
from medvision.geometry import same_grid
from medvision.outputs.dicom_ct import write_ct_series
from medvision.sample_data.phantoms import ORIENTATIONS, make_phantom
from medvision.scans.dicom import read_series
from medvision.scans.pixels import AIR_HU


@pytest.fixture
def phantom():
    return make_phantom((5, 14, 10), n_lesions=0)


@pytest.fixture
def files(tmp_path, phantom):
    return write_ct_series(phantom.volume, tmp_path / "ct", patient_id="p")


def change(path, **attributes):
    """Set attributes in a file; None removes one; a function gets the old value."""
    dataset = pydicom.dcmread(path)
    for keyword, value in attributes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value(dataset.get(keyword)) if callable(value) else value)
    dataset.save_as(path)


def moved(dx=0.0, dy=0.0, dz=0.0):
    return lambda position: [
        float(one) + by for one, by in zip(position, (dx, dy, dz), strict=True)
    ]


def store(path, stored, **attributes):
    """Put other stored values into a file."""
    change(path, PixelData=np.ascontiguousarray(stored).tobytes(), **attributes)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_voxel_is_at_its_place_whatever_the_file_order(tmp_path, orientation):
    volume = make_phantom((6, 14, 10), orientation=orientation, n_lesions=0).volume
    written = write_ct_series(volume, tmp_path, patient_id="p")
    read = read_series([written[i] for i in (3, 0, 5, 1, 4, 2)])
    assert read.array.dtype == np.int16
    for index in ([0, 0, 0], [5, 13, 9], [2, 7, 1]):
        there = np.rint(read.patient_to_index(volume.index_to_patient(index))).astype(int)
        assert read.index_to_patient(there) == pytest.approx(
            volume.index_to_patient(index), abs=1e-3
        )
    turned = np.dot(read.affine[:3, 0], volume.affine[:3, 0]) < 0
    assert (read.array == (volume.array[::-1] if turned else volume.array)).all()
    assert turned == (np.linalg.det(ORIENTATIONS[orientation]) > 0)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_same_as_simpleitk(tmp_path, orientation):
    volume = make_phantom((6, 14, 10), orientation=orientation, n_lesions=0).volume
    write_ct_series(volume, tmp_path, patient_id="p")
    read = read_series(tmp_path.iterdir())
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    image = SimpleITK.ReadImage(names)
    assert (SimpleITK.GetArrayFromImage(image) == read.array).all()
    for index in ([0, 0, 0], [5, 13, 9], [1, 2, 3]):
        expected = image.TransformIndexToPhysicalPoint(index[::-1])
        assert read.index_to_patient(index) == pytest.approx(expected, abs=1e-3)


def test_source_and_uids_are_in_slice_order(tmp_path):
    volume = make_phantom((4, 8, 6), orientation="mirrored", n_lesions=0).volume
    written = write_ct_series(volume, tmp_path, patient_id="p7")
    read = read_series(written)
    by_z = sorted(map(pydicom.dcmread, written), key=lambda one: -one.ImagePositionPatient[2])
    assert read.source.sop_instance_uids == tuple(one.SOPInstanceUID for one in by_z)
    assert read.source.patient_id == "p7"
    assert read.source.modality == "CT"
    assert read.source.study_instance_uid == by_z[0].StudyInstanceUID
    assert read.source.series_instance_uid == by_z[0].SeriesInstanceUID
    assert read.source.frame_of_reference_uid == by_z[0].FrameOfReferenceUID
    assert read.source.path == tmp_path
    assert read.notes == ()


def test_progress_is_told(files):
    reports = []
    read_series(files, on_progress=reports.append)
    assert [(one.done, one.total, one.unit) for one in reports] == [
        (i, 5, "slices") for i in range(1, 6)
    ]


# Values


def test_rescale_is_taken_from_each_slice(files, phantom):
    stored = pydicom.dcmread(files[1]).pixel_array
    change(files[1], RescaleSlope="2", RescaleIntercept="-500")
    array = read_series(files).array
    assert array.dtype == np.int16
    assert (array[1] == stored.astype(int) * 2 - 500).all()
    assert (array[0] == phantom.volume.array[0]).all()


def test_values_that_are_not_whole_become_float32(files, phantom):
    stored = pydicom.dcmread(files[3]).pixel_array
    change(files[3], RescaleSlope="0.25", RescaleIntercept="-100.5")
    array = read_series(files).array
    assert array.dtype == np.float32
    assert array[3] == pytest.approx(stored * 0.25 - 100.5)
    assert (array[2] == phantom.volume.array[2]).all()


def test_values_beyond_int16_become_float32(files):
    for path in files:
        store(path, np.full((14, 10), 60000, "<u2"), RescaleIntercept="0")
    array = read_series(files).array
    assert array.dtype == np.float32
    assert (array == 60000).all()


def test_signed_pixels(files):
    store(files[0], np.full((14, 10), -700, "<i2"), PixelRepresentation=1, RescaleIntercept="10")
    assert (read_series(files).array[0] == -690).all()


@pytest.mark.parametrize(("signed", "value"), [(0, 4000), (1, -5)])
def test_bits_above_bits_stored_do_not_count(files, signed, value):
    bits = (value & 0x0FFF) | 0xA000
    store(
        files[0],
        np.full((14, 10), bits, "<u2"),
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=signed,
        RescaleIntercept="0",
    )
    assert (read_series(files).array[0] == value).all()


def test_missing_rescale_is_said(files):
    for path in files:
        change(path, RescaleSlope=None, RescaleIntercept=None)
    volume = read_series(files)
    assert any("stored values taken as HU" in note for note in volume.notes)
    assert (volume.array[0] == pydicom.dcmread(files[0]).pixel_array).all()


def test_other_rescale_type_is_said(files):
    change(files[2], RescaleType="MGML")
    assert any("MGML" in note for note in read_series(files).notes)


@pytest.mark.parametrize("limit", [None, 10])
def test_padding_becomes_air(files, phantom, limit):
    stored = np.maximum(pydicom.dcmread(files[2]).pixel_array, 50)
    stored[:3, :4] = 5
    stored[3, 0] = 9
    store(files[2], stored, RescaleIntercept="-3000")
    dataset = pydicom.dcmread(files[2])
    dataset.add_new("PixelPaddingValue", "US", 5)
    if limit is not None:
        dataset.add_new("PixelPaddingRangeLimit", "US", limit)
    dataset.save_as(files[2])
    volume = read_series(files)
    assert (volume.array[2, :3, :4] == AIR_HU).all()
    assert (volume.array[2, 3, 0] == AIR_HU) == (limit is not None)
    assert (volume.array[2, 4:] == stored[4:].astype(int) - 3000).all()
    count = 12 if limit is None else 13
    assert any(f"Set {count} padding voxels" in note for note in volume.notes)


def test_signed_padding_written_as_unsigned(files):
    stored = np.full((14, 10), 40, "<i2")
    stored[0, 0] = -2000
    store(files[0], stored, PixelRepresentation=1, RescaleIntercept="0")
    dataset = pydicom.dcmread(files[0])
    dataset.add_new("PixelPaddingValue", "US", 65536 - 2000)
    dataset.save_as(files[0])
    volume = read_series(files)
    assert volume.array[0, 0, 0] == AIR_HU
    assert (volume.array[0, 1:] == 40).all()


def test_modality_lut_sequence(files):
    lut = pydicom.Dataset()
    lut.add_new("LUTDescriptor", "US", [256, 0, 16])
    lut.LUTData = np.arange(0, 768, 3, dtype="<u2").tobytes()
    lut.ModalityLUTType = "HU"
    store(
        files[0],
        np.full((14, 10), 70, "<u2"),
        ModalityLUTSequence=[lut],
        RescaleSlope=None,
        RescaleIntercept=None,
        RescaleType=None,
    )
    assert (read_series(files).array[0] == 210).all()


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_by_pydicom(tmp_path, syntax):
    phantom = make_phantom((3, 64, 48), n_lesions=0)
    files = write_ct_series(phantom.volume, tmp_path, patient_id="p")
    for path in files:
        dataset = pydicom.dcmread(path)
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(path)
    assert pydicom.dcmread(files[0]).file_meta.TransferSyntaxUID == syntax
    assert (read_series(files).array == phantom.volume.array).all()


def compress_with_itk(path):
    """Rewrite a file as JPEG Lossless, the commonest compression of CT, through GDCM."""
    image = SimpleITK.ReadImage(str(path), SimpleITK.sitkInt16)
    old = pydicom.dcmread(path)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.SetFileName(str(path))
    writer.Execute(image)
    new = pydicom.dcmread(path)
    for element in old:
        if element.tag.group not in (0x0028, 0x7FE0):
            new[element.tag] = element
    new.PixelSpacing = old.PixelSpacing
    new.save_as(path)


def test_jpeg_lossless(files, phantom):
    for path in files:
        compress_with_itk(path)
    assert pydicom.dcmread(files[0]).file_meta.TransferSyntaxUID == JPEGLosslessSV1
    assert (read_series(files).array == phantom.volume.array).all()


def test_itk_takes_over_where_pydicom_has_no_decoder(files, phantom, monkeypatch):
    for path in files:
        compress_with_itk(path)
    monkeypatch.setattr(type(get_decoder(JPEGLosslessSV1)), "is_available", False)
    assert (read_series(files).array == phantom.volume.array).all()


@pytest.mark.parametrize("damage", ["short", "none", "slope"])
def test_pixels_that_cannot_be_decoded_name_the_file(files, damage):
    if damage == "slope":
        change(files[2], RescaleSlope="0")
    elif damage == "short":
        change(files[2], PixelData=bytes(20))
    else:
        change(files[2], PixelData=None)
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        read_series(files)
    assert caught.value.where == str(files[2])
    assert caught.value.why


# Geometry


@pytest.mark.parametrize(
    "keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"]
)
def test_a_slice_without_its_place_is_refused(files, keyword):
    change(files[1], **{keyword: None})
    with pytest.raises(InputError, match=f"instance 2 .IM0002.dcm. has no valid {keyword}"):
        read_series(files)


@pytest.mark.parametrize(
    "orientation",
    [[1, 0, 0, 0, 1.01, 0], [1, 0, 0, 0.01, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]],
)
def test_directions_that_are_no_directions_are_refused(files, orientation):
    for path in files:
        change(path, ImageOrientationPatient=orientation)
    with pytest.raises(InputError, match="unit vectors at right angles"):
        read_series(files)


def test_directions_are_made_exact(files):
    for path in files:
        change(path, ImageOrientationPatient=[1.0005, 0, 0, 0, 0.9996, 0])
    assert read_series(files).spacing_mm == pytest.approx((2.5, 0.8, 0.7), abs=1e-9)


def test_zero_pixel_spacing_is_refused(files):
    for path in files:
        change(path, PixelSpacing=[0, 0.7])
    with pytest.raises(InputError, match="above 0 mm"):
        read_series(files)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"SeriesInstanceUID": "1.2.3"}, "SeriesInstanceUID"),
        ({"FrameOfReferenceUID": "1.2.3"}, "FrameOfReferenceUID"),
        ({"Rows": 10, "Columns": 14}, "matrix"),
        ({"PixelSpacing": [0.8, 0.71]}, "PixelSpacing"),
        ({"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, "ImageOrientationPatient"),
    ],
)
def test_mixed_series_are_refused(files, changes, name):
    change(files[3], **changes)
    with pytest.raises(InputError, match=f"one {name}") as caught:
        read_series(files)
    assert "IM0004.dcm" in caught.value.what


def test_a_missing_slice_is_refused_naming_both_sides(files):
    with pytest.raises(InputError) as caught:
        read_series([files[0], files[1], files[2], files[4]])
    assert "5 mm between instance 3 (IM0003.dcm) and instance 5 (IM0005.dcm)" in caught.value.what
    assert "missing" in caught.value.why
    assert caught.value.do


@pytest.mark.parametrize(("shift_mm", "accepted"), [(0.004, True), (0.02, True), (0.04, False)])
def test_jitter_of_the_spacing(files, shift_mm, accepted):
    change(files[2], ImagePositionPatient=moved(dz=shift_mm))
    if accepted:
        assert read_series(files).spacing_mm[0] == pytest.approx(2.5)
    else:
        with pytest.raises(InputError, match="Slice spacing must be uniform"):
            read_series(files)


def test_spacing_tolerance_is_absolute_for_thin_slices(tmp_path):
    volume = make_phantom((4, 8, 6), (0.3, 0.8, 0.7), n_lesions=0).volume
    written = write_ct_series(volume, tmp_path, patient_id="p")
    change(written[1], ImagePositionPatient=moved(dz=0.004))
    assert read_series(written).spacing_mm[0] == pytest.approx(0.3)


def test_slices_off_the_even_grid_are_said(tmp_path):
    volume = make_phantom((21, 8, 6), (5, 1, 1), n_lesions=0).volume
    written = write_ct_series(volume, tmp_path, patient_id="p")
    for index, path in enumerate(written):
        change(path, ImagePositionPatient=moved(dz=0.04 * min(index, 10)))
    assert any("off the even grid" in note for note in read_series(written).notes)


@pytest.mark.parametrize("degrees", [5, 20])
def test_a_tilted_gantry_is_refused_with_its_angle(files, degrees):
    for index, path in enumerate(files):
        change(path, ImagePositionPatient=moved(dy=2.5 * index * np.tan(np.radians(degrees))))
    with pytest.raises(InputError, match=f"a tilt of {degrees}.0 degrees") as caught:
        read_series(files)
    assert "IM0001.dcm" in caught.value.what
    assert "IM0005.dcm" in caught.value.what


def test_micrometres_sideways_are_accepted(files):
    change(files[3], ImagePositionPatient=moved(dx=0.05))
    assert read_series(files).spacing_mm[0] == pytest.approx(2.5)


def test_a_repeated_slice_is_dropped_and_said(files, phantom, tmp_path):
    copy = tmp_path / "copy.dcm"
    shutil.copy(files[2], copy)
    change(copy, SOPInstanceUID="1.2.3")
    volume = read_series([*files, copy])
    assert (volume.array == phantom.volume.array).all()
    assert len(volume.source.sop_instance_uids) == 5
    assert "Dropped 1 slices" in volume.notes[0]


def test_different_slices_at_one_place_are_refused(files, tmp_path):
    copy = tmp_path / "copy.dcm"
    shutil.copy(files[2], copy)
    store(copy, np.zeros((14, 10), "<u2"), SOPInstanceUID="1.2.3")
    with pytest.raises(InputError, match="0 mm apart") as caught:
        read_series([*files, copy])
    assert "IM0003.dcm" in caught.value.what
    assert "copy.dcm" in caught.value.what


@pytest.mark.parametrize(
    ("changes", "spacing", "said"),
    [
        ({"SpacingBetweenSlices": "3", "SliceThickness": "2"}, 3, "SpacingBetweenSlices"),
        ({"SpacingBetweenSlices": None, "SliceThickness": "2"}, 2, "SliceThickness"),
        ({"SpacingBetweenSlices": "0", "SliceThickness": ""}, 1, "1 mm"),
        ({"SpacingBetweenSlices": None, "SliceThickness": None}, 1, "1 mm"),
    ],
)
def test_single_slice(files, changes, spacing, said):
    change(files[0], **changes)
    volume = read_series(files[:1])
    assert volume.shape == (1, 14, 10)
    assert volume.spacing_mm == pytest.approx((spacing, 0.8, 0.7))
    assert said in volume.notes[0]


def test_objects_that_are_no_slices_are_refused(files):
    change(files[0], NumberOfFrames=2)
    with pytest.raises(InputError, match="multi-frame"):
        read_series(files)


def test_no_files():
    with pytest.raises(InputError, match="at least one slice"):
        read_series([])


def test_reading_twice_gives_the_same_grid(files):
    first, second = read_series(files), read_series(files[::-1])
    assert same_grid(first.affine, second.affine, first.shape, 1e-9)
    assert (first.array == second.array).all()
