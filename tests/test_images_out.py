"""Pictures of findings: the right way round, to scale, with the box on the lesion."""

from __future__ import annotations

import time
from itertools import permutations, product

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from medvision.errors import InputError
from medvision.findings.finding import Finding, ScanFindings, SliceBox
from medvision.geometry import Box, box_to_patient, make_affine, patient_to_index
from medvision.outputs import images as images_module
from medvision.outputs.images import MAX_PICTURES, percentile_window, write_finding_pictures
from medvision.outputs.slice_view import direction_letters, view_of
from medvision.scans.volume import Volume

X, Y, Z = np.eye(3)
YELLOW = (255, 210, 0)
AXIAL = make_affine((0, 0, 0), Z, Y, X, (1, 1, 1))


def finding(box, key, number=1, score=0.5, slice_boxes=(), name="nodule"):
    mm = box_to_patient(np.eye(4), box)
    return Finding(number, name, score, box, mm, (0, 0, 0), key, 5.0, 9.0, {}, tuple(slice_boxes))


def found_in(volume, *findings, modality="CT"):
    return ScanFindings(
        "DOE_JANE", volume.shape, volume.affine, findings, ("nodule",), modality=modality
    )


def draw(tmp_path, volume, *findings, window=(0, 100), **rest):
    paths = write_finding_pictures(tmp_path, volume, found_in(volume, *findings, **rest), window)
    return [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in paths]


def in_whole(picture):
    return picture[8:632, 8:632]


def box_edges(picture):
    """Return top, left, bottom, right of what is yellow."""
    rows, columns = np.nonzero((picture == YELLOW).all(axis=2))
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def centroid(picture):
    """Return (down, across), 0..1, of what is nearly white, apart from the letters at the rim."""
    gray = picture[30:-30, 30:-30]
    rows, columns = np.nonzero((gray > 240).all(axis=2))
    return (rows.mean() + 30) / picture.shape[0], (columns.mean() + 30) / picture.shape[1]


def marked(affine, shape, point_mm, size=4):
    """Return a volume that is bright around a point of the patient, and the box of that."""
    index = np.rint(patient_to_index(affine, point_mm)).astype(int)
    box = Box(*np.maximum(index - size // 2, 0).tolist(), *(index + size // 2).tolist())
    array = np.zeros(shape, np.int16)
    array[box.slices] = 100
    return Volume(array, affine), box, int(index[0])


def stored(order, flips, shape=(40, 40, 40), spacing=2.0):
    """Return an affine whose slice, row and column run along patient axes ``order``, centred."""
    directions = [np.eye(3)[axis] * flip for axis, flip in zip(order, flips, strict=True)]
    affine = make_affine((0, 0, 0), *directions, (spacing,) * 3)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("flips", list(product((1, -1), repeat=3)))
def test_however_it_is_stored_right_is_left_and_front_or_head_is_up(tmp_path, order, flips):
    affine = stored(order, flips)
    # A lesion on the patient's right, in front, towards the head.
    volume, box, key = marked(affine, (40, 40, 40), (-20, -20, 20))
    (picture,) = draw(tmp_path, volume, finding(box, key))
    down, across = centroid(in_whole(picture))
    assert across < 0.4  # axial, coronal: right; sagittal: front
    assert down < 0.4  # axial: front; coronal, sagittal: head
    view = view_of(affine, volume.shape)
    letters = {2: "RLAP", 1: "RLHF", 0: "APHF"}[order[0]]
    assert view.left + view.right + view.top + view.bottom == letters


def test_the_letters_of_the_view_agree_with_the_affine():
    rng = np.random.default_rng(3)
    for _ in range(50):
        turn = Rotation.random(random_state=int(rng.integers(1 << 30))).as_matrix()
        affine = make_affine((0, 0, 0), *turn, (3, 1, 2))
        view = view_of(affine, (5, 20, 30))
        # Ask the pixels: the number of each pixel tells its place before the turn.
        rows, columns = np.indices((20, 30))
        down = np.array([view.turn(grid)[1, 0] - view.turn(grid)[0, 0] for grid in (rows, columns)])
        direction = affine[:3, 1:3] @ down
        assert view.bottom == direction_letters(direction / np.linalg.norm(direction))
        assert view.top == direction_letters(-direction / np.linalg.norm(direction))
        assert view.pixel_mm[0] == pytest.approx(np.linalg.norm(direction))


def test_a_box_turns_with_its_slice():
    for order, flips in product(permutations(range(3)), product((1, -1), repeat=3)):
        view = view_of(stored(order, flips), (5, 20, 30))
        plane = np.zeros((20, 30))
        plane[3:7, 10:25] = 1
        turned = view.turn(plane)
        top, left, bottom, right = (int(edge) for edge in view.turn_box((3, 10, 7, 25)))
        assert turned[top:bottom, left:right].all()
        assert turned.sum() == (bottom - top) * (right - left)


@pytest.mark.parametrize("spacing", [(3, 1, 1), (3, 3.0, 1.0), (1, 0.4, 1.2)])
def test_pixels_are_drawn_to_scale(tmp_path, spacing):
    rows, columns = (round(60 / spacing[1]), round(60 / spacing[2]))
    array = np.zeros((3, rows, columns), np.int16)
    box = Box(0, round(24 / spacing[1]), round(24 / spacing[2]),
              3, round(36 / spacing[1]), round(36 / spacing[2]))  # fmt: skip
    array[box.slices] = 100
    volume = Volume(array, make_affine((0, 0, 0), Z, Y, X, spacing))
    (picture,) = draw(tmp_path, volume, finding(box, 1))
    top, left, bottom, right = box_edges(in_whole(picture))
    assert (bottom - top) == pytest.approx(right - left, abs=2)
    assert (bottom - top) == pytest.approx(624 / 5 + 10, abs=3)


def test_the_box_is_around_the_lesion(tmp_path):
    volume, box, key = marked(stored((2, 1, 0), (1, 1, 1)), (40, 40, 40), (20, -16, 0))
    (picture,) = draw(tmp_path, volume, finding(box, key))
    whole = in_whole(picture)
    top, left, bottom, right = box_edges(whole)
    down, across = centroid(whole)
    assert (top + bottom) / 2 == pytest.approx(down * 624, abs=3)
    assert (left + right) / 2 == pytest.approx(across * 624, abs=3)
    zoom = picture[8:384, 640:1016]
    assert (zoom[188, 188] > 240).all()
    assert (zoom[4, 4] < 30).all()


def test_the_detectors_own_box_is_drawn_on_the_key_slice(tmp_path):
    volume = Volume(np.zeros((3, 100, 100), np.int16), stored((2, 1, 0), (1, 1, 1), (3, 100, 100)))
    box = Box(0, 10, 10, 3, 90, 90)
    own = SliceBox(1, 40, 30, 60, 80, 0.9)
    (picture,) = draw(tmp_path, volume, finding(box, 1, slice_boxes=[own]))
    edges = np.array(box_edges(in_whole(picture))) / 6.24
    np.testing.assert_allclose(edges, (40, 30, 60, 80), atol=1.1)


def test_boxes_stay_in_their_panels(tmp_path):
    volume = Volume(np.zeros((3, 50, 50), np.int16), stored((2, 1, 0), (1, 1, 1), (3, 50, 50)))
    slice_boxes = [SliceBox(1, 0, 0, 3, 3, 0.9), SliceBox(2, 40, 40, 50, 50, 0.9)]
    (picture,) = draw(tmp_path, volume, finding(Box(1, 0, 0, 3, 50, 50), 1, 1, 0.5, slice_boxes))
    yellow = (picture == YELLOW).all(axis=2)
    panels = np.zeros_like(yellow)
    panels[8:632, 8:632] = panels[8:384, 640:1016] = panels[408:592, 640:1016] = True
    assert not (yellow & ~panels).any()


@pytest.mark.parametrize(
    ("shape", "box", "key"),
    [
        ((1, 1, 1), Box(0, 0, 0, 1, 1, 1), 0),
        ((1, 300, 5), Box(0, 0, 0, 1, 1, 1), 0),
        ((2, 9, 400), Box(0, 0, 0, 2, 9, 400), 1),
        ((4, 30, 30), Box(0, 29.5, 29.5, 1, 30, 30), 0),
        ((4, 30, 30), Box(-5, -5, -5, 9, 90, 90), 3),
        ((4, 30, 30), Box(0.2, 3.1, 3.1, 0.7, 3.2, 3.2), 0),
    ],
)
def test_odd_shapes_and_boxes_are_drawn(tmp_path, shape, box, key):
    turn = Rotation.from_euler("xyz", (20, 40, 60), True).as_matrix()
    volume = Volume(np.zeros(shape, np.float32), make_affine((0, 0, 0), *turn, (5, 0.5, 0.7)))
    (picture,) = draw(tmp_path, volume, finding(box, key), window=None)
    assert picture.shape == (720, 1024, 3)
    assert (picture == YELLOW).all(axis=2).any()


def test_projections_get_no_letters(tmp_path):
    volume = Volume(np.zeros((1, 50, 50), np.int16), AXIAL)
    box = Box(0, 20, 20, 1, 30, 30)
    (scan,) = draw(tmp_path, volume, finding(box, 0), modality="CT")
    (projection,) = draw(tmp_path, volume, finding(box, 0), modality="DX")
    assert in_whole(scan)[300:325, :25].max() > 200
    assert in_whole(projection)[300:325, :25].max() == 0


def test_no_identifier_is_burned_in_or_attached(tmp_path):
    volume = Volume(np.zeros((1, 50, 50), np.int16), AXIAL)
    item = finding(Box(0, 20, 20, 1, 30, 30), 0)
    one, other = found_in(volume, item), found_in(volume, item)
    object.__setattr__(other, "case_id", "someone else")
    (path,) = write_finding_pictures(tmp_path, volume, one, (0, 1))
    first = path.read_bytes()
    write_finding_pictures(tmp_path, volume, other, (0, 1))
    assert path.read_bytes() == first
    assert Image.open(path).info == {}


def test_names_of_any_script_and_length_are_drawn(tmp_path):
    volume = Volume(np.zeros((1, 50, 50), np.int16), AXIAL)
    item = finding(Box(0, 20, 20, 1, 30, 30), 0, name="узел\nλ " + "W" * 500)
    (picture,) = draw(tmp_path, volume, item)
    assert picture[:, 1017:].max() == 0
    assert picture[640:662, 8:60].max() > 200


def test_one_picture_per_finding_named_by_id_and_the_best_fifty(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_PICTURES", 2)
    volume = Volume(np.zeros((2, 20, 20), np.int16), AXIAL)
    box = Box(0, 5, 5, 1, 8, 8)
    items = [finding(box, 0, number, score) for number, score in ((1, 0.2), (2, 0.9), (12, 0.5))]
    paths = write_finding_pictures(tmp_path, volume, found_in(volume, *items), (0, 1))
    assert [path.name for path in paths] == ["finding_02.png", "finding_12.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finding_02.png", "finding_12.png"]
    assert MAX_PICTURES == 50


def test_no_findings_are_no_pictures(tmp_path):
    volume = Volume(np.zeros((2, 20, 20), np.int16), AXIAL)
    assert write_finding_pictures(tmp_path / "new", volume, found_in(volume)) == []
    assert not (tmp_path / "new").exists()


def test_wrong_calls_are_refused(tmp_path):
    volume = Volume(np.zeros((2, 20, 20), np.int16), AXIAL)
    found = found_in(volume, finding(Box(0, 5, 5, 1, 8, 8), 0))
    other = Volume(np.zeros((2, 20, 21), np.int16), AXIAL)
    with pytest.raises(InputError, match="one shape"):
        write_finding_pictures(tmp_path, other, found)
    with pytest.raises(InputError, match="low below high"):
        write_finding_pictures(tmp_path, volume, found, (5, 5))


def test_the_window_of_a_scan_without_units():
    values = np.arange(10_000.0).reshape(1, 100, 100)
    assert percentile_window(values) == pytest.approx((100, 9899), abs=1)
    assert percentile_window(np.full((2, 3, 4), 7.0)) == (6.5, 7.5)


def test_the_window_makes_black_and_white(tmp_path):
    array = np.full((1, 50, 50), -1000, np.int16)
    array[0, :, 25:] = 3000
    (picture,) = draw(tmp_path, Volume(array, AXIAL), finding(Box(0, 2, 2, 1, 5, 5), 0),
                      window=(-160, 240))  # fmt: skip
    whole = in_whole(picture)
    assert whole[500, 200].tolist() == [0, 0, 0]
    assert whole[500, 450].tolist() == [255, 255, 255]


def test_a_picture_takes_less_than_four_tenths_of_a_second(tmp_path):
    volume = Volume(np.zeros((40, 512, 512), np.int16), AXIAL)
    items = [finding(Box(3, 100, 100, 9, 120, 120), 5, number) for number in range(1, 6)]
    draw(tmp_path, volume, items[0])  # fonts and libraries are loaded once
    started = time.process_time()
    draw(tmp_path, volume, *items)
    assert (time.process_time() - started) / 5 < 0.4
