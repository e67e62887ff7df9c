"""A folder of findings and a folder of labels -> cases to evaluate, and what could not be used."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medvision.errors import InputError, MedvisionError, UsageError
from medvision.evaluation.case import CaseResult
from medvision.findings.finding import ScanFindings
from medvision.scans.volume import Volume

ImageReader = Callable[[str], "Volume | None"]
"""Takes a case_id and returns its scan, or None where there is no picture to show."""

_LABEL_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd", ".csv")


@dataclass(frozen=True)
class ScanPlace:
    """Where a scan's voxels are: the path that ``source.json`` names, and the series in it."""

    path: Path
    series_instance_uid: str = ""


@dataclass(frozen=True)
class LoadedCases:
    """Cases with both findings and reference, and the case_ids and sentences on the rest.

    ``without_truth``: findings but no label file, so not evaluated and not taken as healthy.
    ``without_findings``: a label file but no findings. ``problems``: what could not be read.
    ``model`` is that of the first findings; two different models are a problem.
    """

    cases: tuple[CaseResult, ...]
    class_names: tuple[str, ...]
    without_truth: tuple[str, ...] = ()
    without_findings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    model: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, ScanPlace] = field(default_factory=dict)


def load_cases(findings_folder: Path | str, truth: Path | str) -> LoadedCases:
    """Read every findings.json below a folder, and its reference from ``truth``.

    ``truth`` is a data set (its ``labels`` folder is taken) or a folder of label files. Patients
    come from its ``cases.csv`` if it has one. A findings file or label that cannot be read, or
    that lies in another geometry than its scan, is listed under ``problems`` and ends nothing.
    Raises UsageError if a folder is not there, InputError if there is no findings.json at all.
    """
    folder, truth = Path(findings_folder), Path(truth)
    for path in (folder, truth):
        if not path.is_dir():
            raise UsageError("A folder is needed here, and there is none.", where=path)
    labels = truth / "labels" if (truth / "labels").is_dir() else truth
    problems: list[str] = []
    found = _read_all(folder, problems)
    patients = _patients(truth, labels)
    places = {case_id: place for case_id, (_, place) in found.items() if place is not None}
    cases, unlabelled, used = [], [], set()
    for case_id, (scan, place) in found.items():
        try:
            case = _case(scan, labels, place, patients.get(case_id, ""))
        except MedvisionError as error:
            problems.append(f"{case_id}: {error.what}")
            used.add(case_id)
            continue
        if case is None:
            unlabelled.append(case_id)
        else:
            cases.append(case)
            used.add(case_id)
    scans = [scan for scan, _ in found.values()]
    return LoadedCases(
        cases=tuple(cases),
        class_names=tuple(dict.fromkeys(name for scan in scans for name in scan.class_names)),
        without_truth=tuple(unlabelled),
        without_findings=tuple(sorted(_labelled(labels, places) - used - set(unlabelled))),
        problems=tuple(problems + _model_problems(scans)),
        model=scans[0].model if scans else {},
        places=places,
    )


def image_reader(loaded: LoadedCases, scans: Path | str | None = None) -> ImageReader:
    """Return a reader of the scans: from the folder ``scans`` if given, else where they were.

    A scan that is gone, or that cannot be read, gives None.
    """
    places = dict(loaded.places)
    if scans is not None:
        places.update(_places_in(Path(scans)))

    def read(case_id: str) -> Volume | None:
        from medvision.scans.load import read_scan

        place = places.get(case_id)
        if place is None:
            return None
        try:
            series = place.series_instance_uid if place.path.is_dir() else ""
            return read_scan(place.path, series or None)
        except (MedvisionError, OSError):
            return None

    return read


def _read_all(
    folder: Path, problems: list[str]
) -> dict[str, tuple[ScanFindings, ScanPlace | None]]:
    from medvision.outputs.json_csv import read_findings

    # A hidden folder is what an interrupted run left behind.
    files = [
        file
        for file in sorted(folder.rglob("findings.json"))
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(
            "There is no findings.json in this folder.",
            where=folder,
            do="give the folder that medvision predict wrote",
        )
    found: dict[str, tuple[ScanFindings, ScanPlace | None]] = {}
    for file in files:
        try:
            scan = read_findings(file)
        except MedvisionError as error:
            problems.append(f"{file.relative_to(folder)}: {error.what}")
            continue
        if scan.case_id in found:
            problems.append(
                f"{file.relative_to(folder)}: {scan.case_id} came already; this file is left out."
            )
            continue
        found[scan.case_id] = (scan, _place(file.parent / "source.json", scan))
    return found


def _place(file: Path, scan: ScanFindings) -> ScanPlace | None:
    try:
        named = Path(json.loads(file.read_text(encoding="utf-8"))["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    beside = file.parent / named
    path = beside if not named.exists() and beside.exists() else named
    return ScanPlace(path, scan.series_instance_uid)


def _case(
    scan: ScanFindings, labels: Path, place: ScanPlace | None, patient: str
) -> CaseResult | None:
    from medvision.labels.masks import read_labels

    path = place.path if place else None
    found = read_labels(labels, scan.case_id, scan.shape, scan.affine, scan_path=path)
    if found is None:
        return None
    everything = (*scan.findings, *scan.candidates)
    return CaseResult(scan.case_id, everything, tuple(found), scan.affine, scan.shape, patient)


def _labelled(labels: Path, places: Mapping[str, ScanPlace]) -> set[str]:
    scans = {place.path.name for place in places.values()}
    names = set()
    for file in labels.iterdir():
        suffix = next((end for end in _LABEL_SUFFIXES if file.name.endswith(end)), None)
        if suffix and file.name != "cases.csv" and file.name not in (scans - {""}):
            names.add(file.name.removesuffix(suffix))
    return names


def _patients(truth: Path, labels: Path) -> dict[str, str]:
    for folder in (truth, labels.parent):
        if (folder / "cases.csv").is_file():
            with (folder / "cases.csv").open(encoding="utf-8-sig", newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if row.get("case_id")]
            return {row["case_id"]: row.get("patient_id") or "" for row in rows}
    return {}


def _model_problems(scans: list[ScanFindings]) -> list[str]:
    models = {tuple(sorted(scan.model.items())) for scan in scans}
    if len(models) < 2:
        return []
    return [f"The findings come from {len(models)} different models; they are scored as one."]


def _places_in(folder: Path) -> dict[str, ScanPlace]:
    from medvision.scans.load import find_scans

    root = next((folder / n for n in ("scans", "images") if (folder / n).is_dir()), folder)
    return {one.case_id: ScanPlace(one.path, one.series_instance_uid) for one in find_scans(root)}
