"""The whole evaluation on a set of scans worked out by hand, and its laws."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvision import geometry
from medvision.errors import InputError, UsageError
from medvision.evaluation.case import CaseResult
from medvision.evaluation.evaluate import evaluate
from medvision.evaluation.results import Evaluation
from medvision.findings.finding import Finding
from medvision.geometry import Box
from medvision.labels.annotation import Annotation

AFFINE = geometry.make_affine((5.0, -9.0, 30.0), (0, 0, 1), (0, -1, 0), (1, 0, 0), (2.0, 0.5, 0.5))
NAMES = ("solid", "glass")


def box_at(row: int, pixels: int) -> Box:
    return Box(4, row, 20, 6, row + pixels, 20 + pixels)


def lesion(label: int, row: int, class_name: str = "solid", pixels: int = 10) -> Annotation:
    return Annotation(label, class_name, box_at(row, pixels))


def finding(
    number: int, row: int, score: float, class_name: str = "solid", pixels: int = 10
) -> Finding:
    box = box_at(row, pixels)
    x, y, z = geometry.index_to_patient(AFFINE, box.center_index).tolist()
    box_mm = geometry.box_to_patient(AFFINE, box)
    return Finding(number, class_name, score, box, box_mm, (x, y, z), 4, 5.0, 60.0)


def scan(case_id: str, findings: list[Finding], lesions: list[Annotation]) -> CaseResult:
    return CaseResult(case_id, tuple(findings), tuple(lesions), AFFINE, (20, 300, 300))


def four_scans() -> list[CaseResult]:
    """Two solid and two glass lesions (5, 5, 10 and 5 mm), one never hit; three false positives."""
    return [
        scan(
            "a",
            [finding(1, 20, 0.9), finding(2, 200, 0.8), finding(3, 22, 0.3)],
            [lesion(1, 20), lesion(2, 100, "glass")],
        ),
        scan("b", [finding(1, 50, 0.6, pixels=20)], [lesion(1, 50, "glass", 20)]),
        scan("c", [finding(1, 50, 0.7, "glass"), finding(2, 150, 0.2)], []),
        scan("d", [finding(1, 60, 0.4)], [lesion(1, 60)]),
    ]


def assert_same(first: Evaluation, second: Evaluation) -> None:
    assert first.to_dict() == second.to_dict()


def test_counts_by_hand() -> None:
    result = evaluate(four_scans(), class_names=NAMES, operating_fp=0.5, draws=200)
    assert (result.scans, result.healthy_scans, result.lesions) == (4, 1, 4)
    point = result.operating
    # By score: hit .9, false .8, false .7, hit .6, hit .4, (second hit .3), false .2
    assert point.threshold == 0.4
    assert (point.detected, point.missed, point.false_positives) == (3, 1, 2)
    assert point.fp_per_scan == 0.5
    assert point.fp_per_healthy_scan == 1.0
    assert point.fp_per_diseased_scan == pytest.approx(1 / 3)
    assert point.ppv == pytest.approx(3 / 5)
    assert point.findings == 5
    assert point.sensitivity.value == 0.75
    found = [item.value for item in result.overall.any_class.sensitivity]
    assert found == [0.25, 0.25, 0.75, 0.75, 0.75, 0.75, 0.75]
    assert result.overall.any_class.cpm.value == pytest.approx((0.25 * 2 + 0.75 * 5) / 7)
    # Hits .9, .6, .4 of 4 at precisions 1, 2/4, 3/5; boxes are equal, the second hit is false.
    ap = (26 * 1 + 50 * 0.6) / 101
    assert result.overall.ap["0.5"].value == pytest.approx(ap)
    assert result.overall.ap["0.1"].value == pytest.approx(ap)


def test_classes_by_hand() -> None:
    result = evaluate(four_scans(), class_names=NAMES, operating_fp=0.5, draws=0)
    solid, glass = result.classes
    assert (solid.scans, solid.lesions, solid.detected, solid.missed) == (2, 2, 2, 0)
    assert (glass.scans, glass.lesions, glass.detected, glass.missed) == (2, 2, 1, 1)
    assert (solid.false_positives, glass.false_positives) == (1, 1)
    # Any class: false positives .8 .7 .2 of all classes; found at .9 .4, at .6 and never.
    assert [item.value for item in solid.any_class.sensitivity] == [0.5, 0.5, 1, 1, 1, 1, 1]
    assert [item.value for item in glass.any_class.sensitivity] == [0, 0, 0.5, 0.5, 0.5, 0.5, 0.5]
    # Class-wise: solid has false positives .8, .6 (on a glass lesion), .2; glass .7 and no hit.
    assert [item.value for item in solid.class_wise.sensitivity] == [0.5, 0.5, 1, 1, 1, 1, 1]
    assert [item.value for item in glass.class_wise.sensitivity] == [0] * 7
    assert glass.ap["0.1"].value == 0.0
    assert solid.sensitivity.low is None
    # Solid: hit, false, false, hit.
    assert solid.ap["0.1"].value == pytest.approx((51 * 1 + 50 * 0.5) / 101)
    assert result.mean_ap["0.1"] == pytest.approx((51 * 1 + 50 * 0.5) / 101 / 2)


def test_confusion_sizes_and_lists_by_hand() -> None:
    result = evaluate(four_scans(), class_names=NAMES, operating_fp=0.5, draws=50)
    table = result.confusion
    assert table.counts == ((2, 0), (1, 0))
    assert table.accuracy.value == pytest.approx(2 / 3)
    assert (table.majority_class, table.majority_accuracy) == ("solid", pytest.approx(2 / 3))
    assert [(size.lesions, size.detected) for size in result.sizes] == [
        (3, 2),
        (0, 0),
        (1, 1),
        (0, 0),
    ]
    assert result.sizes[1].sensitivity.value is None
    missed = [item for item in result.lesion_results if not item.detected]
    assert [(item.case_id, item.label, item.finding_id) for item in missed] == [("a", 2, None)]
    assert missed[0].nearest_finding_id == 3
    assert missed[0].nearest_mm == pytest.approx(39.0)
    false = [(item.case_id, item.score, item.healthy) for item in result.false_positive_results]
    assert false == [("a", 0.8, False), ("c", 0.7, True)]


def test_missed_lesion_names_the_hit_below_the_threshold() -> None:
    cases = [
        scan("a", [finding(1, 200, 0.8), finding(2, 20, 0.11)], [lesion(1, 20)]),
        scan("b", [finding(1, 200, 0.7)], []),
    ]
    result = evaluate(cases, class_names=NAMES, operating_fp=0.5, draws=10)
    (missed,) = result.lesion_results
    assert (missed.detected, missed.finding_id, missed.score) == (False, 2, 0.11)
    assert result.confusion.accuracy.value is None
    assert result.confusion.majority_class is None


def test_order_of_scans_findings_and_lesions_does_not_matter() -> None:
    cases = four_scans()
    result = evaluate(cases, class_names=NAMES, draws=100)
    turned = [replace(case, findings=case.findings[::-1]) for case in cases[::-1]]
    assert_same(result, evaluate(turned, class_names=NAMES, draws=100))


def test_perfect_detector_is_one_everywhere() -> None:
    cases = [
        scan(name, [finding(1, 40, 0.5, kind)], [lesion(1, 40, kind)])
        for name, kind in (("a", "solid"), ("b", "glass"), ("c", "solid"))
    ]
    result = evaluate(cases, class_names=NAMES, draws=100)
    for row in (result.overall, *result.classes):
        assert row.any_class.cpm.value == row.class_wise.cpm.value == 1.0
        assert row.ap["0.1"].value == row.ap["0.5"].value == 1.0
        assert row.missed == row.false_positives == 0
    assert result.confusion.accuracy.value == 1.0
    assert result.operating.fp_per_healthy_scan is None


@pytest.mark.parametrize(
    "cases",
    [
        [scan("a", [], [])],
        [scan("a", [finding(1, 20, 0.5)], [])],
        [scan("a", [], [lesion(1, 20)])],
        [scan("a", [finding(1, 20, 0.5)], [replace(lesion(1, 20), ignore=True)])],
        [scan("a", [finding(1, 99, 1.0), finding(2, 20, 0.0)], [lesion(1, 20)])],
    ],
)
@pytest.mark.parametrize("names", [(), NAMES])
def test_nothing_to_find_or_nothing_found_is_no_error(
    cases: list[CaseResult], names: tuple[str, ...]
) -> None:
    result = evaluate(cases, class_names=names, operating_fp=0.5, draws=20)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["scans"] == 1
    if not result.lesions:
        assert result.operating.sensitivity.value is None
        assert result.overall.any_class.cpm.value is None
        assert result.overall.ap["0.1"].value is None
        assert result.mean_ap["0.1"] is None


def test_ignored_region_leaves_the_scan_healthy_and_its_finding_uncounted() -> None:
    ignored = replace(lesion(1, 20), ignore=True)
    result = evaluate([scan("a", [finding(1, 20, 0.5)], [ignored])], class_names=NAMES, draws=0)
    assert (result.healthy_scans, result.ignored, result.lesions) == (1, 1, 0)
    assert result.operating.false_positives == 0


def test_class_that_only_the_reference_has_is_added() -> None:
    cases = [scan("a", [], [lesion(1, 20, "cyst")]), scan("b", [], [])]
    result = evaluate(cases, class_names=NAMES, draws=0)
    assert result.class_names == ("solid", "glass", "cyst")
    assert [item.ap["0.1"].value for item in result.classes] == [None, None, 0.0]
    assert result.mean_ap_classes == 1
    assert any("cyst (1)" in text for text in result.warnings)
    assert any("solid, glass" in text for text in result.warnings)


def test_intervals_cover_the_value_and_grow_with_fewer_scans() -> None:
    def many(count: int) -> list[CaseResult]:
        return [
            scan(f"s{n:03}", [finding(1, 40 if n % 3 else 200, n / 1000)], [lesion(1, 40)])
            for n in range(count)
        ]

    wide, narrow = (
        evaluate(many(count), class_names=["solid"], draws=400).operating.sensitivity
        for count in (15, 120)
    )
    for item in (wide, narrow):
        assert item.low is not None
        assert item.low <= item.value <= item.high
    assert wide.high - wide.low > narrow.high - narrow.low


def test_one_scan_has_no_interval() -> None:
    result = evaluate([scan("a", [finding(1, 20, 0.9)], [lesion(1, 20)])], class_names=["solid"])
    assert result.operating.sensitivity.value == 1.0
    assert result.operating.sensitivity.low is None
    assert result.overall.any_class.band_low == ()


def test_curve_keeps_every_corner() -> None:
    curve = evaluate(four_scans(), class_names=NAMES, draws=0).overall.any_class
    points = list(zip(curve.curve_fp_per_scan, curve.curve_sensitivity, strict=True))
    assert points == [(0, 0), (0, 0.25), (0.5, 0.25), (0.5, 0.5), (0.5, 0.75), (0.75, 0.75)]


def test_refusals() -> None:
    with pytest.raises(InputError, match="one scan"):
        evaluate([], class_names=NAMES)
    with pytest.raises(InputError, match="a came again"):
        evaluate([scan("a", [], []), scan("a", [], [])], class_names=NAMES)
    with pytest.raises(UsageError, match="0 or more"):
        evaluate(four_scans(), class_names=NAMES, operating_fp=float("nan"))


ROWS = st.lists(
    st.tuples(st.sampled_from([20, 24, 60, 100, 200]), st.sampled_from([0.1, 0.4, 0.4, 0.9])),
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(ROWS, st.lists(st.sampled_from([20, 60, 100]), unique=True))), ROWS)
def test_more_false_positives_never_help(rows: list, added: list) -> None:
    def build(extra: list) -> list[CaseResult]:
        return [scan("z", [finding(n, 280, s) for n, (_, s) in enumerate(extra, 1)], [])] + [
            scan(
                f"s{number}",
                [finding(n, row, score) for n, (row, score) in enumerate(found, 1)],
                [lesion(n, row) for n, row in enumerate(lesions, 1)],
            )
            for number, (found, lesions) in enumerate(rows)
        ]

    before, after = (
        evaluate(build(extra), class_names=["solid"], draws=0) for extra in ([], added)
    )
    if before.lesions:
        for old, new in zip(
            before.overall.any_class.sensitivity, after.overall.any_class.sensitivity, strict=True
        ):
            assert new.value <= old.value + 1e-12
        assert after.operating.detected <= before.operating.detected
        assert after.overall.ap["0.1"].value <= before.overall.ap["0.1"].value + 1e-12
