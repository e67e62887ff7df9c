"""No patient on both sides, every class shared out, the same seed the same split."""

from __future__ import annotations

from collections import Counter
from math import ceil, floor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvision.datasets.discover import Case
from medvision.datasets.split import split_cases
from medvision.errors import UsageError
from medvision.scans.load import ScanReference


def case(name, patient):
    return Case(name, ScanReference(name, Path(name), "nifti"), Path("labels"), patient)


@st.composite
def datasets(draw):
    patients = draw(st.lists(st.integers(0, 8), min_size=1, max_size=25))
    cases = [case(f"c{number}", f"p{patient}") for number, patient in enumerate(patients)]
    names = st.sets(st.sampled_from(["nodule", "cyst", "met"]))
    classes = {one.case_id: draw(names) for one in cases if draw(st.booleans())}
    return cases, classes


@settings(max_examples=150, deadline=None)
@given(datasets(), st.floats(0.01, 0.99), st.integers(0, 1000), st.randoms())
def test_laws(dataset, fraction, seed, random):
    cases, classes = dataset
    train, validation = split_cases(cases, classes, fraction, seed)
    assert sorted(one.case_id for one in train + validation) == sorted(one.case_id for one in cases)
    sides = [{one.patient_id for one in side} for side in (train, validation)]
    assert not sides[0] & sides[1]
    patients = {one.patient_id for one in cases}
    assert train
    assert bool(validation) == (len(patients) >= 2)
    shuffled = list(cases)
    random.shuffle(shuffled)
    again = split_cases(shuffled, classes, fraction, seed)
    assert [{one.case_id for one in side} for side in again] == [
        {one.case_id for one in side} for side in (train, validation)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_every_class_is_shared_out_to_within_one_patient(seed):
    cases = [case(f"c{number}", f"p{number}") for number in range(60)]
    names = ["rare"] * 5 + ["common"] * 25 + [""] * 30
    classes = {one.case_id: {name} - {""} for one, name in zip(cases, names, strict=True)}
    for number in range(5):
        classes[f"c{number}"].add("common")  # counts as rare all the same
    _, validation = split_cases(cases, classes, 0.2, seed)
    assert len(validation) == 12
    counts = Counter(names[int(one.case_id[1:])] for one in validation)
    for name, size in {"rare": 5, "common": 25, "": 30}.items():
        assert floor(size * 0.2) <= counts[name] <= ceil(size * 0.2)


@pytest.mark.parametrize("seed", range(20))
def test_a_class_of_one_patient_stays_in_training(seed):
    cases = [case(f"c{number}", f"p{number}") for number in range(10)]
    train, _ = split_cases(cases, {"c3": {"unique"}}, 0.5, seed)
    assert "c3" in {one.case_id for one in train}


def test_seeds_differ():
    cases = [case(f"c{number}", f"p{number}") for number in range(30)]
    splits = {
        tuple(one.case_id for one in split_cases(cases, {}, 0.3, seed)[1]) for seed in range(10)
    }
    assert len(splits) == 10


def test_every_patient_is_drawn_at_times():
    cases = [case(f"c{number}", f"p{number}") for number in range(10)]
    drawn = Counter(
        one.case_id for seed in range(300) for one in split_cases(cases, {}, 0.2, seed)[1]
    )
    assert len(drawn) == 10
    assert min(drawn.values()) > 30


def test_one_patient_gives_no_validation():
    cases = [case("a", "p"), case("b", "p")]
    assert split_cases(cases, {}, 0.2, 0) == (cases, [])


def test_order_is_kept():
    cases = [case(f"c{number}", f"p{number}") for number in range(20)]
    for side in split_cases(cases, {}, 0.4, 1):
        numbers = [int(one.case_id[1:]) for one in side]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_is_a_wrong_call(fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        split_cases([case("a", "p"), case("b", "q")], {}, fraction, 0)
