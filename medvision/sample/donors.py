"""Which LIDC patient's nodules go into which case: each patient into one case only, seeded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medvision.errors import InputError
from medvision.sample.config import SampleConfig
from medvision.sample.lidc import Nodule, Outline

_PURPOSE = 1


@dataclass(frozen=True)
class Plan:
    """The nodules to put into one case, and the outlines that its healthy patches are cut with.

    ``elsewhere``: the case shows some other part of the body than the training lung.
    """

    case_id: str
    nodules: tuple[Nodule, ...]
    patch_outlines: tuple[Outline, ...]
    elsewhere: bool = False

    @property
    def patient_ids(self) -> frozenset[str]:
        """The LIDC patients that the nodules come from."""
        return frozenset(nodule.patient_id for nodule in self.nodules)


def usable_nodules(nodules: Sequence[Nodule], config: SampleConfig) -> list[Nodule]:
    """Keep nodules with enough readers and a size in range, none of the CT's own patient."""
    low, high = config.diameter_mm
    return [
        nodule
        for nodule in nodules
        if nodule.patient_id != config.ct_patient_id
        and len(nodule.outlines) >= config.min_readers
        and low <= nodule.diameter_mm <= high
    ]


def plan_cases(
    nodules: Sequence[Nodule], config: SampleConfig
) -> tuple[tuple[Plan, ...], tuple[Plan, ...]]:
    """Return the plans of the training and of the test cases.

    Patients are drawn with a chance that grows with their number of nodules, and a patient's nodules
    come in random order, so that sizes and classes follow LIDC's own distribution over nodules. A
    patient is not used again, whether or not the case needed all of its nodules.
    Raises InputError if there are too few patients.
    """
    rng = np.random.default_rng([config.seed, _PURPOSE, 0])
    donors = _donors(usable_nodules(nodules, config), rng)
    train_counts = [0] * config.train.healthy_scans
    diseased = config.train.scans - config.train.healthy_scans
    train_counts += _draw_counts(config.train.nodule_counts, diseased, rng)
    test_counts = _draw_counts(config.test.nodule_counts, config.test.scans, rng)
    try:
        test = [_plan(f"test_{i:03d}", n, donors) for i, n in enumerate(test_counts)]
        shuffled = rng.permutation(train_counts).tolist()
        train = [_plan(f"train_{i:03d}", n, donors) for i, n in enumerate(shuffled)]
    except StopIteration:
        raise InputError("The outlines come from too few patients for so many cases.") from None
    # The order of the cases is random already: no further draw, which would change all that follow.
    healthy = [index for index, plan in enumerate(train) if not plan.nodules]
    for index in healthy[: config.train.elsewhere_scans]:
        train[index] = replace(train[index], elsewhere=True)
    return tuple(train), tuple(test)


def _donors(nodules: list[Nodule], rng: np.random.Generator) -> Iterator[list[Nodule]]:
    by_patient: dict[str, list[Nodule]] = defaultdict(list)
    for nodule in nodules:
        by_patient[nodule.patient_id].append(nodule)
    patients = sorted(by_patient)
    weights = np.array([len(by_patient[patient]) for patient in patients], dtype=float)
    order = rng.choice(len(patients), len(patients), replace=False, p=weights / weights.sum())
    for place in order:
        own = by_patient[patients[place]]
        yield [own[i] for i in rng.permutation(len(own))]


def _draw_counts(shares: dict[int, float], cases: int, rng: np.random.Generator) -> list[int]:
    weights = np.array(list(shares.values()), dtype=float)
    return rng.choice(list(shares), size=cases, p=weights / weights.sum()).tolist()


def _plan(case_id: str, count: int, donors: Iterator[list[Nodule]]) -> Plan:
    chosen: list[Nodule] = []
    while len(chosen) < count:
        chosen += next(donors)[: count - len(chosen)]
    patches = tuple(outline for nodule in next(donors) for outline in nodule.outlines)
    return Plan(case_id, tuple(chosen), patches)
