"""Findings as a label volume: the voxels, the place, and who wins where findings overlap."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from medvision.findings.finding import Finding, ScanFindings, SliceBox
from medvision.geometry import Box, box_to_patient, index_to_patient, make_affine
from medvision.outputs.label_volume import paint_findings, write_finding_labels
from medvision.scans.images import read_image

SHAPE = (6, 20, 24)
AFFINE = make_affine((-30.5, 40, 50), *Rotation.from_euler("xyz", (10, 20, 30), True).as_matrix(),
                     (2.5, 0.7, 0.9))  # fmt: skip


def finding(number, box, score=0.5, mask=None, slice_boxes=()):
    mm = box_to_patient(AFFINE, box)
    return Finding(number, "x", score, box, mm, (0, 0, 0), int(box.slice_min), 1.0, 1.0, {},
                   tuple(slice_boxes), mask)  # fmt: skip


def scan_findings(*findings, shape=SHAPE):
    return ScanFindings("a", shape, AFFINE, findings, ("x",))


def test_masks_keep_their_voxels():
    mask = np.random.default_rng(0).random((2, 3, 4)) < 0.5
    labels = paint_findings(scan_findings(finding(3, Box(1, 2, 3, 3, 5, 7), mask=mask)))
    want = np.zeros(SHAPE, np.uint8)
    want[1:3, 2:5, 3:7][mask] = 3
    np.testing.assert_array_equal(labels, want)


def test_the_higher_score_keeps_the_voxel_whatever_the_order():
    strong = finding(1, Box(0, 0, 0, 2, 2, 2), 0.9, np.ones((2, 2, 2), bool))
    weak = finding(2, Box(1, 1, 1, 3, 3, 3), 0.1, np.ones((2, 2, 2), bool))
    for order in ((strong, weak), (weak, strong)):
        labels = paint_findings(scan_findings(*order))
        assert labels[1, 1, 1] == 1
        assert (labels == 1).sum() == 8
        assert (labels == 2).sum() == 7


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.tuples(*[st.integers(0, 3)] * 3), st.floats(0, 1)), max_size=5))
def test_every_voxel_belongs_to_the_best_finding_there(items):
    findings = [
        finding(number, Box(*low, *np.add(low, 2).tolist()), score, np.ones((2, 2, 2), bool))
        for number, (low, score) in enumerate(items, start=1)
    ]
    labels = paint_findings(scan_findings(*findings))
    for index in np.ndindex(5, 5, 5):
        here = [
            one
            for one in findings
            if (one.box.lower <= index).all() and (index < one.box.upper).all()
        ]
        best = max(here, key=lambda one: (one.score, -one.finding_id), default=None)
        assert labels[index] == (best.finding_id if best else 0)


def test_slice_boxes_become_ellipses():
    boxes = [SliceBox(2, 4, 6, 14, 22, 0.5), SliceBox(4, 0, 0, 1, 1, 0.5)]
    labels = paint_findings(scan_findings(finding(1, Box(2, 0, 0, 5, 14, 22), slice_boxes=boxes)))
    assert set(np.flatnonzero(labels.any(axis=(1, 2)))) == {2, 4}
    rows, columns = np.nonzero(labels[2])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 13, 6, 21)
    assert labels[2].sum() == pytest.approx(np.pi / 4 * 10 * 16, rel=0.03)
    assert labels[2, 4, 6] == 0
    assert np.argwhere(labels[4]).tolist() == [[0, 0]]


def test_a_slice_box_over_the_edge_is_cut():
    boxes = [SliceBox(0, -4, -4, 4, 4, 0.5), SliceBox(1, 10, 14, 30, 40, 0.5)]
    labels = paint_findings(scan_findings(finding(1, Box(0, 0, 0, 2, 20, 24), slice_boxes=boxes)))
    assert labels[0, 0, 0] == 1
    assert labels[1, 19, 23] == 1


def test_a_bare_box_becomes_an_ellipsoid():
    labels = paint_findings(scan_findings(finding(1, Box(0, 2, 3, 6, 16, 20))))
    assert labels.sum() == pytest.approx(np.pi / 6 * 6 * 14 * 17, rel=0.05)


def test_simpleitk_finds_the_label_at_the_patients_place(tmp_path):
    box = Box(2, 3, 4, 3, 4, 5)
    write_finding_labels(
        tmp_path / "findings.nii.gz", scan_findings(finding(7, box, mask=np.ones((1, 1, 1), bool)))
    )
    image = SimpleITK.ReadImage(str(tmp_path / "findings.nii.gz"))
    point = index_to_patient(AFFINE, (2, 3, 4)).tolist()
    assert image[image.TransformPhysicalPointToIndex(point)] == 7
    assert SimpleITK.GetArrayFromImage(image).sum() == 7


def test_no_findings_are_a_zero_volume_in_the_grid(tmp_path):
    write_finding_labels(tmp_path / "findings.nii.gz", scan_findings(shape=(1, 3, 4)))
    volume = read_image(tmp_path / "findings.nii.gz")
    assert volume.shape == (1, 3, 4)
    assert not volume.array.any()
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)


def test_more_than_255_findings_fit(tmp_path):
    many = [finding(300, Box(0, 0, 0, 1, 1, 1), mask=np.ones((1, 1, 1), bool))]
    write_finding_labels(tmp_path / "findings.nii.gz", scan_findings(*many))
    assert read_image(tmp_path / "findings.nii.gz").array[0, 0, 0] == 300
