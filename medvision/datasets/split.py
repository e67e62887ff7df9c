"""Split cases into training and validation so that no patient is on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from medvision.datasets.discover import Case
from medvision.errors import UsageError

HEALTHY = ""
"""Stratum of the cases without any lesion."""


def split_cases(
    cases: Sequence[Case],
    classes: Mapping[str, set[str]],
    fraction: float,
    seed: int,
) -> tuple[list[Case], list[Case]]:
    """Return (training, validation), each in the order of ``cases``.

    ``classes`` gives the classes of lesions by case id; a case that is not in it, or has an empty
    set, counts as healthy. About ``fraction`` (0..1) of the patients go to validation, at least one
    on each side. A patient counts for the rarest class that he has, and of every such group the
    same share is drawn, to within one patient; a class that only one patient has stays in training,
    where something can be learnt from it. One patient cannot be split: validation is then empty,
    and callers must say so. The same seed gives the same split whatever the order of ``cases``.
    Raises UsageError for a fraction outside 0..1.
    Source: systematic sampling from the patients ordered by group (Cochran, Sampling Techniques,
    chapter 8). scikit-learn's splitters refuse groups smaller than the number of parts.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"The validation fraction must lie between 0 and 1; got {fraction}.")
    patients = sorted({case.patient_id for case in cases})
    if len(patients) < 2:
        return list(cases), []
    chosen = _validation_patients(patients, _strata(cases, classes), fraction, seed)
    train = [case for case in cases if case.patient_id not in chosen]
    return train, [case for case in cases if case.patient_id in chosen]


def _strata(cases: Sequence[Case], classes: Mapping[str, set[str]]) -> dict[str, str]:
    """Return the rarest class of each patient: the one that the fewest patients have."""
    owned: dict[str, set[str]] = {case.patient_id: set() for case in cases}
    for case in cases:
        owned[case.patient_id] |= classes.get(case.case_id, set())
    counts = Counter(name for names in owned.values() for name in names)
    return {
        patient: min(names, key=lambda name: (counts[name], name), default=HEALTHY)
        for patient, names in owned.items()
    }


def _validation_patients(
    patients: Sequence[str], strata: Mapping[str, str], fraction: float, seed: int
) -> set[str]:
    random = np.random.default_rng(seed)
    sizes = Counter(strata.values())
    pool = [patient for patient in patients if sizes[strata[patient]] > 1] or list(patients)
    pool = [pool[index] for index in random.permutation(len(pool))]
    pool.sort(key=lambda patient: strata[patient])
    count = min(max(round(len(patients) * fraction), 1), len(pool) - 1 or 1)
    step = count / len(pool)
    passed = np.floor(np.arange(len(pool) + 1) * step + random.random())
    return {patient for patient, taken in zip(pool, np.diff(passed), strict=True) if taken}
