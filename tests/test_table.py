"""The label CSV: written, read, and refused with the line that is wrong."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvision.errors import InputError
from medvision.geometry import Box, BoxMm
from medvision.labels.table import COLUMNS, LabelRow, read_table, write_table

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1).filter(
    lambda name: name.lower() != "background"
)
EDGES = st.tuples(*[st.floats(-10, 10)] * 3, *[st.floats(10.5, 1000)] * 3)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.builds(LabelRow, st.integers(1, 999), NAMES, st.booleans(),
                               st.none() | EDGES.map(lambda edges: Box(*edges))),
                     unique_by=lambda row: row.label))  # fmt: skip
def test_rows_come_back_as_they_were(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    write_table(path, rows)
    assert read_table(path) == rows


def test_millimetres_are_kept_to_a_thousandth(tmp_path):
    row = LabelRow(1, "x", False, None, BoxMm(-1.23456, 0, 0, 1, 2, 3), 7.65432)
    write_table(tmp_path / "a.csv", [row])
    (back,) = read_table(tmp_path / "a.csv")
    assert back.box_mm == BoxMm(-1.235, 0, 0, 1, 2, 3)
    assert back.diameter_mm == 7.654


def test_columns_stand_in_their_order_and_pandas_reads_them(tmp_path):
    import pandas

    write_table(tmp_path / "a.csv", [LabelRow(2, 'a "quoted", name', True, Box(0, 1, 2, 3, 4, 5))])
    frame = pandas.read_csv(tmp_path / "a.csv")
    assert tuple(frame.columns) == COLUMNS
    assert frame.loc[0, "class"] == 'a "quoted", name'
    assert frame.loc[0, "column_max"] == 5
    assert frame.loc[0, "ignore"] == 1


def test_hand_made_files_are_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfclass, label,comment\r\nnodule , 3,seen\r\n\r\n,,\r\ncyst,4\r\n")
    assert read_table(path) == [LabelRow(3, "nodule"), LabelRow(4, "cyst")]
    path.write_text("label,class,ignore\n1,a,\n2,b,0\n3,c,1\n4,d,TRUE\n")
    assert [row.ignore for row in read_table(path)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs the columns label and class"),
        ("label;class\n1;x\n", "needs the columns"),
        ("label,class,ignroe\n1,x,1\n", "did you mean 'ignore'"),
        ("label,class\n1,x\n0,x\n", "whole number from 1; got '0'"),
        ("label,class\n1.5,x\n", "whole number from 1"),
        ("label,class\nnan,x\n", "finite number"),
        ("label,class\none,x\n", "label must be a finite number; got 'one'"),
        ("label,class\n,x\n", "whole number from 1; got ''"),
        ("label,class\n1,\n", "class must have a name"),
        ("label,class\n1,BACKGROUND\n", "other than background"),
        ("label,class\n1,x\n1,y\n", r"twice: \[1\]"),
        ("label,class,ignore\n1,x,2\n", "ignore must be 0 or 1"),
        ("label,class,slice_min\n1,x,2\n", "empty: row_min"),
        (",".join(COLUMNS) + "\n1,x,0,5,0,0,5,1,1" + "," * 7 + "\n", "slice_min < slice_max"),
        (",".join(COLUMNS) + "\n1,x,0" + "," * 7 + "0,0,0,1,1,-1,\n", "each min below its max"),
        ("label,class,diameter_mm\n1,x,inf\n", "diameter_mm must be a finite"),
    ],
)
def test_wrong_files_are_refused_with_the_reason(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_the_wrong_line_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("label,class\n1,x\n2,\n")
    with pytest.raises(InputError) as caught:
        read_table(path)
    assert caught.value.where == f"{path}, line 3"


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"label,class\n1,\xff\xfe\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_table(tmp_path / "a.csv")


def test_no_rows_leave_only_the_header(tmp_path):
    write_table(tmp_path / "a.csv", [])
    with (tmp_path / "a.csv").open() as stream:
        assert list(csv.reader(stream)) == [list(COLUMNS)]
