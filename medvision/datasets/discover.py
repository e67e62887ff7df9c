"""Find the cases of a dataset folder: scans, the labels that belong to them, and their patients."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medvision.errors import InputError
from medvision.labels.annotation import Annotation
from medvision.labels.masks import has_labels, read_labels
from medvision.progress import ProgressCallback, ignore_progress
from medvision.scans.images import image_suffix
from medvision.scans.load import LABEL_FOLDER, ScanReference, find_scans, read_reference
from medvision.scans.volume import Volume

SCAN_FOLDERS = ("scans", "images")
"""Folders of a dataset that hold its scans; without either, the dataset itself is searched."""

CASES_FILE = "cases.csv"


@dataclass(frozen=True)
class Case:
    """A scan with labels; whether it is healthy is known only once it is loaded.

    ``labels`` is the folder of its label files. ``patient_id`` groups cases for the split: from
    cases.csv, else the DICOM header, else the case id. It is never printed.
    """

    case_id: str
    scan: ScanReference
    labels: Path
    patient_id: str = field(repr=False)

    @property
    def path(self) -> Path:
        """The scan's file, or the folder of its DICOM series."""
        return self.scan.path


@dataclass(frozen=True)
class Dataset:
    """The cases of a folder, in the order of their ids.

    ``unlabelled`` are the ids of scans without a label file: they are not healthy, only unread, and
    no cases. ``problems`` are (file or case id, sentence) pairs that a user should look at.
    """

    cases: tuple[Case, ...]
    unlabelled: tuple[str, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LoadedCase:
    """A case with its voxels and its annotations; no annotations mean a healthy scan."""

    case: Case
    volume: Volume
    annotations: tuple[Annotation, ...]


def find_cases(data: Path) -> Dataset:
    """Find the cases of a dataset folder, or of a single scan file, by names and headers only.

    Scans are those in ``data/scans`` or ``data/images``, else in ``data``; labels are in
    ``data/labels``, else in ``data``; ``data/cases.csv`` may give patients. Raises UsageError if
    ``data`` does not exist; InputError if no scan is in it, two scans have one id, or cases.csv is
    not what it should be.
    """
    data = Path(data)
    root, labels = _root(data), _label_folder(data)
    references, problems = find_dataset_scans(data)
    patients = _read_patients(root / CASES_FILE)
    cases, unlabelled = [], []
    for reference in references:
        name = reference.case_id
        if has_labels(labels, name, reference.path):
            patient = patients.get(name) or reference.patient_id or name
            cases.append(Case(name, reference, labels, patient))
        else:
            unlabelled.append(name)
    known = {reference.case_id for reference in references}
    problems += [
        (name, f"{CASES_FILE} names a case that has no scan.") for name in patients.keys() - known
    ]
    problems += _labels_without_scan(labels, root, known)
    problems += _one_patient_id(cases, patients)
    return Dataset(tuple(cases), tuple(unlabelled), tuple(sorted(problems)))


def load_case(case: Case, *, on_progress: ProgressCallback = ignore_progress) -> LoadedCase:
    """Read a case's voxels and its annotations.

    Raises InputError if the scan cannot be read, or its labels do not fit it or are gone.
    """
    volume = read_reference(case.scan, on_progress=on_progress)
    annotations = read_labels(
        case.labels, case.case_id, volume.shape, volume.affine, scan_path=case.path
    )
    if annotations is None:
        raise InputError(f"The labels of {case.case_id} are gone.", where=case.labels)
    return LoadedCase(case, volume, tuple(annotations))


def _root(data: Path) -> Path:
    """Return the dataset folder: that of a single file may be the parent of scans/."""
    if not data.is_file():
        return data
    return data.parent.parent if data.parent.name in SCAN_FOLDERS else data.parent


def _label_folder(data: Path) -> Path:
    folder = _root(data) / LABEL_FOLDER
    return folder if folder.is_dir() else folder.parent


def find_dataset_scans(data: Path) -> tuple[list[ScanReference], list[tuple[str, str]]]:
    """Return the scans of a dataset folder, labelled or not, in the order of their ids.

    The second part lists what was left out as (path, sentence) pairs. Scans are looked for as
    ``find_cases`` does and it raises the same errors.
    """
    labels = _label_folder(data)
    folders = [data / name for name in SCAN_FOLDERS if (data / name).is_dir()] or [data]
    searches = [find_scans(folder) for folder in folders]
    references = [one for search in searches for one in search]
    series = {one.case_id for one in references if one.kind == "dicom"}
    references = [
        one
        for one in sorted(references, key=lambda one: one.case_id)
        if one.kind == "dicom" or one.case_id not in series or one.path.parent != labels
    ]
    if not references:
        raise InputError(
            "A dataset needs at least one scan; none was found.",
            where=data,
            do=f"Put scans (DICOM folders, .nii.gz, .mha, .nrrd) into {data / SCAN_FOLDERS[0]}.",
        )
    _check_unique(references, data)
    skipped = [
        skip for search in searches for skip in search.skipped if skip.path.suffix.lower() != ".csv"
    ]
    counts = Counter(skip.reason for skip in skipped)
    first = {skip.reason: skip.path for skip in reversed(skipped)}
    problems = [
        (str(first[reason]), f"{count} left out, this one first: {reason}.")
        for reason, count in counts.items()
        if reason != "label folder"
    ]
    return references, problems


def _check_unique(references: Sequence[ScanReference], data: Path) -> None:
    counts = Counter(reference.case_id for reference in references)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        paths = [str(one.path) for one in references if one.case_id == twice[0]]
        raise InputError(
            f"Every scan needs an id of its own; {twice[0]} is that of {' and '.join(paths)}"
            f"{f', and {len(twice) - 1} more ids come twice' if len(twice) > 1 else ''}.",
            where=data,
            do="Rename the files so that no two names are equal, or take one scan out.",
        )


def _read_patients(path: Path) -> dict[str, str]:
    """Return the patient id by case id; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
    except UnicodeDecodeError as error:
        raise InputError(f"{CASES_FILE} must be UTF-8 text.", where=path, why=str(error)) from error
    if not {"case_id", "patient_id"} <= set(reader.fieldnames or ()):
        raise InputError(
            f"{CASES_FILE} needs the columns case_id and patient_id; "
            f"it has {list(reader.fieldnames or ())}.",
            where=path,
        )
    patients: dict[str, str] = {}
    for row in reader:
        name = (row["case_id"] or "").strip()
        if name in patients:
            raise InputError(f"{CASES_FILE} may name a case once; {name} comes twice.", where=path)
        if name:
            patients[name] = (row["patient_id"] or "").strip()
    return patients


def _labels_without_scan(labels: Path, root: Path, known: set[str]) -> list[tuple[str, str]]:
    """List label files that no scan claims: mostly a misspelt name."""
    if labels == root:
        return []
    problems = []
    for path in sorted(labels.iterdir()):
        suffix = ".csv" if path.suffix.lower() == ".csv" else image_suffix(path)
        if suffix and not path.name.startswith(".") and path.name[: -len(suffix)] not in known:
            problems.append((str(path), "No scan has the name of this label file."))
    return problems


def _one_patient_id(cases: list[Case], patients: dict[str, str]) -> list[tuple[str, str]]:
    """Warn of an anonymiser that gave all patients the same PatientID."""
    dicom = [case for case in cases if case.scan.patient_id and not patients.get(case.case_id)]
    if len(dicom) < 2 or len({case.scan.patient_id for case in dicom}) > 1:
        return []
    return [
        (
            CASES_FILE,
            f"All {len(dicom)} DICOM cases carry the same PatientID and so stay on one side of the "
            f"split; if they are different patients, say so in {CASES_FILE} (case_id,patient_id).",
        )
    ]
