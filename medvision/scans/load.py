"""Find scans under a path and read one: DICOM by content, volume files by their name's ending."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from medvision.errors import InputError, UsageError
from medvision.progress import ProgressCallback, ignore_progress
from medvision.scans.dicom import read_instances, read_series
from medvision.scans.images import IMAGE_KINDS, image_suffix, read_image
from medvision.scans.series import Series, Skipped, choose_series, find_instances, group_series
from medvision.scans.volume import Volume

LABEL_FOLDER = "labels"
"""A folder of this name directly under the searched path holds labels, which are no scans."""


@dataclass(frozen=True)
class ScanReference:
    """Where one scan is, before its voxels are read.

    ``case_id`` is a volume file's name without its ending, or the SeriesInstanceUID. ``kind`` is
    "dicom", "nifti", "metaimage" or "nrrd". ``path`` is the file, or the folder of the series.
    """

    case_id: str
    path: Path
    kind: str
    modality: str = ""
    series_instance_uid: str = ""
    n_files: int = 1
    description: str = ""
    patient_id: str = field(default="", repr=False)
    files: tuple[Path, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class ScanSearch:
    """What a search found; iterating gives the references.

    ``skipped`` lists what was left out, each with ``path`` and ``reason``.
    """

    references: tuple[ScanReference, ...]
    skipped: tuple[Skipped, ...]

    def __iter__(self) -> Iterator[ScanReference]:
        """Go through the references."""
        return iter(self.references)

    def __len__(self) -> int:
        """Return the number of references."""
        return len(self.references)


def find_scans(path: str | Path) -> ScanSearch:
    """Find every scan in a file or under a folder, by headers only.

    Localizers, reports, unreadable and other files are listed as skipped and never end the search.
    Raises UsageError if ``path`` does not exist.
    """
    images, series, skipped = _survey(Path(path))
    references = [_image_reference(image) for image in images]
    references += [_series_reference(one) for one in series]
    return ScanSearch(
        tuple(sorted(references, key=lambda one: (str(one.path), one.case_id))), tuple(skipped)
    )


def read_scan(
    path: str | Path,
    series: str | int | None = None,
    *,
    on_progress: ProgressCallback = ignore_progress,
) -> Volume:
    """Read one scan: a file, or a folder that holds a DICOM series or one volume file.

    ``series`` chooses among DICOM series by UID, number or description. Raises UsageError if
    ``path`` does not exist; InputError if no scan or no single one is found, or it cannot be read.
    """
    path = Path(path)
    if path.is_file() and image_suffix(path) is not None:
        return read_image(path)
    images, found, skipped = _survey(path)
    if found or (series is not None and not images):
        chosen, notes = choose_series(found, series, path)
        notes += _notes_on_skipped(images, skipped)
        return read_instances(chosen.instances, notes=notes, on_progress=on_progress)
    if len(images) != 1:
        raise _no_single_scan(path, images, skipped)
    return read_image(images[0])


def read_reference(
    reference: ScanReference, *, on_progress: ProgressCallback = ignore_progress
) -> Volume:
    """Read the scan of a reference from ``find_scans`` without searching again."""
    if reference.kind == "dicom":
        return read_series(reference.files, on_progress=on_progress)
    return read_image(reference.path)


def _survey(path: Path) -> tuple[list[Path], list[Series], list[Skipped]]:
    """Return volume files, series and what was skipped."""
    if not path.exists():
        raise UsageError("The path of a scan must exist.", where=path, do="check the spelling.")
    images, others, skipped = [], [], []
    for file in [path] if path.is_file() else _files_below(path):
        if file.relative_to(path).parts[:1] == (LABEL_FOLDER,):
            skipped.append(Skipped(file, "label folder"))
        elif image_suffix(file) is not None:
            images.append(file)
        else:
            others.append(file)
    instances, unread = find_instances(others)
    series, left_out = group_series(instances)
    return images, series, skipped + unread + left_out


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield visible files in order of name; links are followed, each folder is entered once."""
    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(name)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        yield from (Path(name, one) for one in sorted(files) if not one.startswith("."))


def _image_reference(path: Path) -> ScanReference:
    suffix = image_suffix(path) or ""
    return ScanReference(
        path.name[: len(path.name) - len(suffix)], path, IMAGE_KINDS[suffix], files=(path,)
    )


def _series_reference(series: Series) -> ScanReference:
    first = series.first
    return ScanReference(
        first.series_instance_uid,
        series.folder,
        "dicom",
        first.modality,
        first.series_instance_uid,
        len(series.instances),
        first.series_description,
        first.patient_id,
        tuple(instance.path for instance in series.instances),
    )


def _notes_on_skipped(images: list[Path], skipped: list[Skipped]) -> tuple[str, ...]:
    notes = [f"Left aside {len(images)} volume files beside the DICOM files."] if images else []
    counts = Counter(skip.reason for skip in skipped)
    notes += [f"Left out {count} x {reason}." for reason, count in sorted(counts.items())]
    return tuple(notes)


def _no_single_scan(path: Path, images: list[Path], skipped: list[Skipped]) -> InputError:
    if images:
        return InputError(
            f"One scan must be chosen; the folder holds {len(images)} volume files.",
            where=path,
            why=f"found {', '.join(image.name for image in images[:10])}",
            do="pass the path of one of them.",
        )
    kinds = Counter(skip.path.suffix.lower() or "without ending" for skip in skipped)
    reasons = Counter(skip.reason for skip in skipped)
    files = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
    return InputError(
        f"No scan was found; looked at {len(skipped)} files{f' ({files})' if files else ''}.",
        where=path,
        why="; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5)) or None,
        do=f"pass a folder with a DICOM series, or a file that ends in {', '.join(IMAGE_KINDS)}.",
    )
