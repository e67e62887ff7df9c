"""findings.json and findings.csv: valid by the schema, read back, and refused field by field."""

from __future__ import annotations

import copy
import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import medvision.outputs
from medvision.errors import InputError, UsageError
from medvision.findings.finding import Finding, ScanFindings, SliceBox
from medvision.geometry import Box, BoxMm, box_to_patient, make_affine
from medvision.outputs.json_csv import findings_to_json, read_findings, write_findings

SCHEMA = json.loads(
    (Path(medvision.outputs.__file__).parent / "findings.schema.json").read_text(encoding="utf-8")
)
DOCS = Path(__file__).parent.parent / "docs" / "findings-json.md"
AFFINE = make_affine((-30.5, 40, 50), *Rotation.from_euler("xyz", (10, 20, 30), True).as_matrix(),
                     (2.5, 0.7, 0.9))  # fmt: skip


def finding(number=1, name="nodule", score=0.75, box=None, **rest):
    box = box or Box(2, 10.5, 20.25, 5, 16.5, 27)
    fields = {
        "box_mm": box_to_patient(AFFINE, box),
        "center_mm": (1.5, -2.5, 3.25),
        "key_slice": 3,
        "diameter_mm": 6.1,
        "volume_mm3": 88.8,
        "class_scores": {"nodule": 0.75, "cyst": 0.25},
        "slice_boxes": (SliceBox(3, 10.5, 20.25, 16.5, 27, 0.7), SliceBox(4, 11, 21, 16, 26, 0.5)),
    }
    return Finding(number, name, score, box, **{**fields, **rest})


def scan_findings(*findings, **rest):
    fields = {
        "case_id": "case-7",
        "shape": (30, 40, 50),
        "affine": AFFINE,
        "findings": findings,
        "score_thresh": 0.3,
        "class_names": ("nodule", "cyst"),
        "modality": "CT",
        "study_instance_uid": "1.2.3",
        "series_instance_uid": "1.2.3.4",
        "frame_of_reference_uid": "1.2.3.5",
        "notes": ("Slice order was repaired.",),
        "model": {"run": "lung", "weights_sha256": "ab" * 32},
    }
    return ScanFindings(**{**fields, **rest})


def equal(first, second):
    np.testing.assert_array_equal(first.affine, second.affine)
    same = replace(first, affine=second.affine) == second
    return same and first.affine.dtype == second.affine.dtype


def document(*findings):
    return json.loads(json.dumps(findings_to_json(scan_findings(*findings))))


def test_findings_come_back_as_they_were(tmp_path):
    given_findings = scan_findings(finding(1), finding(2, "cyst", 0.1, slice_boxes=()))
    write_findings(tmp_path, given_findings)
    assert equal(read_findings(tmp_path), given_findings)
    assert equal(read_findings(tmp_path / "findings.json"), given_findings)


def test_masks_are_not_in_the_file(tmp_path):
    box = Box(2, 10, 20, 3, 12, 22)
    masked = finding(box=box, mask=np.ones((1, 2, 2), bool))
    write_findings(tmp_path, scan_findings(masked))
    assert equal(read_findings(tmp_path), scan_findings(replace(masked, mask=None)))


NUMBERS = st.floats(-1e6, 1e6)
SCORES = st.floats(0, 1)


@st.composite
def any_findings(draw):
    made = []
    for number in range(1, draw(st.integers(0, 4)) + 1):
        low = np.array(draw(st.tuples(*[st.floats(0, 25)] * 3)))
        high = low + np.array(draw(st.tuples(*[st.floats(0.01, 20)] * 3)))
        box = Box(*low.tolist(), *high.tolist())
        made.append(
            finding(
                number,
                draw(st.sampled_from(["nodule", "cyst"])),
                draw(SCORES),
                box,
                center_mm=draw(st.tuples(*[NUMBERS] * 3)),
                key_slice=draw(st.integers(0, 29)),
                diameter_mm=draw(st.floats(0, 1e3)),
                class_scores=draw(st.dictionaries(st.text(), SCORES, max_size=3)),
            )
        )
    return scan_findings(*made, notes=tuple(draw(st.lists(st.text(), max_size=2))))


def _text_is_utf8(found):
    texts = [*found.notes, *(name for item in found.findings for name in item.class_scores)]
    return not re.search("[\ud800-\udfff]", "".join(texts))


@settings(max_examples=60, deadline=None)
@given(any_findings().filter(_text_is_utf8))
def test_any_findings_are_valid_and_come_back(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("json")
    write_findings(folder, found)
    jsonschema.validate(json.loads((folder / "findings.json").read_text("utf-8")), SCHEMA)
    assert equal(read_findings(folder), found)


def test_schema_is_valid_and_names_every_field():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    made = document(finding())
    assert set(made) == set(SCHEMA["properties"]) == set(SCHEMA["required"])
    described = SCHEMA["$defs"]["finding"]
    assert set(made["findings"][0]) == set(described["properties"]) == set(described["required"])
    box = SCHEMA["$defs"]["slice_box"]
    assert set(made["findings"][0]["slice_boxes"][0]) == set(box["properties"])
    assert set(made["grid"]) == set(SCHEMA["properties"]["grid"]["properties"])


def test_the_page_names_every_field_and_its_example_is_valid(tmp_path):
    text = DOCS.read_text(encoding="utf-8")
    for name in [*SCHEMA["properties"], *SCHEMA["$defs"]["finding"]["properties"]]:
        assert f"`{name}`" in text, name
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL).group(1)
    jsonschema.validate(json.loads(example), SCHEMA)
    (tmp_path / "findings.json").write_text(example)
    found = read_findings(tmp_path)
    item = found.findings[0]
    want = vars(box_to_patient(found.affine, item.box))
    assert vars(item.box_mm) == pytest.approx(want)


def test_head_of_the_file(tmp_path):
    write_findings(tmp_path, scan_findings())
    made = json.loads((tmp_path / "findings.json").read_text())
    assert made["schema_version"] == "1"
    assert made["intended_use"] == "For research use only. Not for diagnosis."
    assert made["generator"] == {"name": "medvision", "version": medvision.__version__}
    assert made["frame"] == "LPS"
    assert made["grid"]["index_order"] == "slice,row,column"
    assert made["findings"] == []


def test_slice_range_is_the_slices_that_are_touched():
    made = document(finding(box=Box(2, 1, 1, 5, 2, 2)), finding(2, box=Box(1.5, 1, 1, 2.5, 2, 2)))
    assert [one["slice_range"] for one in made["findings"]] == [
        {"first": 2, "last": 4},
        {"first": 1, "last": 2},
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_written(tmp_path, value):
    with pytest.raises(InputError, match="finite"):
        write_findings(tmp_path, scan_findings(finding(diameter_mm=value)))
    assert list(tmp_path.iterdir()) == []


GONE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema_version"], "2", "schema_version must be '1'"),
        (["schema_version"], GONE, "schema_version must be there"),
        (["frame"], "RAS", "frame must be 'LPS'"),
        (["grid"], [], "grid must be an object"),
        (["grid", "index_order"], "x,y,z", "grid.index_order must be"),
        (["grid", "shape"], [1, 2], "grid.shape must be three"),
        (["grid", "shape"], [1, 2, 0], "grid.shape must be three"),
        (["grid", "shape"], [1, 2, True], "grid.shape must be three"),
        (["grid", "affine"], [[1, 2], [3]], "grid.affine must be a 4 x 4"),
        (["grid", "affine"], [[0] * 4] * 4, "grid.affine must have independent axes"),
        (["class_names"], "nodule", "class_names must be a list"),
        (["class_names"], [1], "class_names must be a list of strings"),
        (["model"], {"run": 3}, "model.run must be a string"),
        (["case_id"], None, "case_id must be a string"),
        (["findings"], {}, "findings must be a list"),
        (["findings", 0], 7, r"findings\[0\] must be an object"),
        (["findings", 0, "score"], 1.5, r"findings\[0\].score must be a finite number from 0 to 1"),
        (["findings", 0, "score"], True, "score must be a number"),
        (["findings", 0, "score"], "0.5", "score must be a number"),
        (["findings", 0, "score"], GONE, r"findings\[0\].score must be there"),
        (["findings", 0, "finding_id"], 0, "finding_id must be a finite number from 1"),
        (["findings", 0, "finding_id"], 1.5, "finding_id must be a whole number"),
        (["findings", 1, "finding_id"], 1, "each finding_id once"),
        (["findings", 0, "class"], "tumour", "class must be one of"),
        (["findings", 0, "class_scores", "cyst"], -1, "class_scores.cyst must be"),
        (["findings", 0, "key_slice"], 30, "key_slice must be a finite number from 0 to 29"),
        (["findings", 0, "diameter_mm"], -1, "diameter_mm must be"),
        (["findings", 0, "volume_mm3"], 10**400, "volume_mm3 must be a finite"),
        (["findings", 0, "box_voxel", "row_max"], 0, r"findings\[0\].box_voxel must have each min"),
        (["findings", 0, "box_mm", "x_max_mm"], -999, "box_mm must have each min"),
        (["findings", 0, "center_mm", "z"], GONE, "center_mm.z must be there"),
        (["findings", 0, "slice_boxes", 1, "score"], 2, r"slice_boxes\[1\].score must be"),
        (["findings", 0, "slice_boxes", 1, "row_max"], 2, r"slice_boxes\[1\] must have each min"),
        (["findings", 0, "slice_boxes", 1, "slice_index"], -1, "slice_index must be"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_field(tmp_path, path, value, message):
    made = document(finding(1), finding(2))
    parent = made
    for step in path[:-1]:
        parent = parent[step]
    if value is GONE:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    file = tmp_path / "findings.json"
    file.write_text(json.dumps(made))
    with pytest.raises(InputError, match=message) as caught:
        read_findings(file)
    assert caught.value.where == str(file)


def test_fields_of_a_later_minor_version_are_passed_over(tmp_path):
    made = document(finding())
    made["color"] = made["findings"][0]["mood"] = "blue"
    (tmp_path / "findings.json").write_text(json.dumps(made))
    assert equal(read_findings(tmp_path), scan_findings(finding()))


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", "null", "\xff", "[" * 100_000, '{"a": NaN}'])
def test_files_that_are_no_findings_are_refused(tmp_path, text):
    (tmp_path / "findings.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError):
        read_findings(tmp_path)


def test_nan_in_a_file_is_refused(tmp_path):
    made = document(finding())
    made["findings"][0]["diameter_mm"] = float("nan")
    (tmp_path / "findings.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="NaN is not a JSON number"):
        read_findings(tmp_path)
    text = json.dumps(copy.deepcopy(document(finding()))).replace("88.8", "1e999")
    (tmp_path / "findings.json").write_text(text)
    with pytest.raises(InputError, match="volume_mm3 must be a finite"):
        read_findings(tmp_path)


def test_a_missing_file_is_a_wrong_call(tmp_path):
    with pytest.raises(UsageError, match="readable"):
        read_findings(tmp_path)


def rows_of(folder):
    with (folder / "findings.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_csv_has_a_row_per_finding(tmp_path):
    write_findings(tmp_path, scan_findings(finding(1), finding(2, "cyst", 0.5)))
    first, second = rows_of(tmp_path)
    assert first["case_id"] == "case-7"
    assert [first["finding_id"], second["finding_id"]] == ["1", "2"]
    assert second["class"] == "cyst"
    assert float(first["row_min"]) == 10.5
    assert float(first["x_min_mm"]) == pytest.approx(finding().box_mm.x_min_mm, abs=1e-4)
    assert [first["first_slice"], first["last_slice"], first["key_slice"]] == ["2", "4", "3"]
    assert float(first["center_z_mm"]) == 3.25
    assert float(first["score_cyst"]) == 0.25


def test_csv_without_findings_is_a_header(tmp_path):
    write_findings(tmp_path, scan_findings())
    assert len((tmp_path / "findings.csv").read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@SUM(A1)", "\tx", "=cmd|' /C calc'!A0"])
def test_csv_cells_start_no_formula(tmp_path, name):
    found = scan_findings(finding(name=name), class_names=(name,), case_id=name)
    write_findings(tmp_path, found)
    (row,) = rows_of(tmp_path)
    assert row["class"] == row["case_id"] == f"'{name}"
    assert read_findings(tmp_path).findings[0].class_name == name


def test_negative_numbers_stay_numbers(tmp_path):
    mm = BoxMm(-5, -6, -7, 1, 2, 3)
    write_findings(tmp_path, scan_findings(finding(box_mm=mm)))
    assert float(rows_of(tmp_path)[0]["x_min_mm"]) == -5


def test_candidates_are_kept_apart_and_come_back(tmp_path):
    scan = scan_findings(finding(1), candidates=(finding(2, score=0.2), finding(3, score=0.1)))
    write_findings(tmp_path, scan)
    made = json.loads((tmp_path / "findings.json").read_text())
    jsonschema.validate(made, SCHEMA)
    assert [item["finding_id"] for item in made["findings"]] == [1]
    assert [item["finding_id"] for item in made["candidates"]] == [2, 3]
    assert made["score_thresh"] == 0.3
    back = read_findings(tmp_path)
    assert [item.score for item in back.candidates] == [0.2, 0.1]
    assert equal(back, scan)
    assert len((tmp_path / "findings.csv").read_text().splitlines()) == 2
    made["candidates"][0]["finding_id"] = 1
    (tmp_path / "findings.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="once"):
        read_findings(tmp_path)
