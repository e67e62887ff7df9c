"""Predict all scans under a path, a folder each; one failing scan does not end the rest."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from medvision.datasets.discover import find_dataset_scans
from medvision.errors import (
    Interrupted,
    MedvisionError,
    ResourceError,
    ran_out_of_memory,
)
from medvision.export.engines import check_run, load_predictor
from medvision.files import atomic_write_text
from medvision.findings.finding import ScanFindings
from medvision.outputs.case_folder import SUMMARY_FILE, count_kept, folder_name, write_case_folder
from medvision.outputs.json_csv import INTENDED_USE
from medvision.progress import Progress, ProgressCallback, StopCallback, ignore_progress, never_stop
from medvision.scans.choose import choose_series
from medvision.scans.load import ScanReference, read_reference
from medvision.scans.volume import Volume

_LOG = logging.getLogger("medvision.batch")

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)


class ScanPredictor(Protocol):
    """What finds lesions: medvision.predict.Predictor, or a stand-in in a test."""

    about: dict[str, str]

    def __call__(
        self, volume: Volume, case_id: str | None = None, on_progress: ProgressCallback = ...
    ) -> ScanFindings:
        """Return the findings of a volume."""


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one scan: ``status`` is "done", "kept" (was there already) or "failed".

    ``folder`` is the name of its folder in the output folder; ``reason`` says why it failed.
    ``candidates`` counts what scored too little to be a finding.
    """

    case_id: str
    status: str
    folder: str = ""
    findings: int = 0
    candidates: int = 0
    seconds: float = 0.0
    reason: str = ""
    replaced: bool = False
    """Findings of another model, other settings or other files were there."""
    notes: tuple[str, ...] = ()
    """What the reader repaired or assumed, in sentences."""


@dataclass(frozen=True)
class BatchSummary:
    """What became of all scans; ``skipped`` are (path, sentence) pairs of what was no scan."""

    out: Path
    outcomes: tuple[CaseOutcome, ...]
    skipped: tuple[tuple[str, str], ...]
    seconds: float

    def with_status(self, status: str) -> tuple[CaseOutcome, ...]:
        """Return the scans that are "done", "kept" or "failed"."""
        return tuple(one for one in self.outcomes if one.status == status)


def predict_scans(
    run: Path,
    inputs: Path,
    out: Path,
    *,
    series: str | int | None = None,
    device: str = "auto",
    score_thresh: float | None = None,
    engine: str = "torch",
    overwrite: bool = False,
    on_progress: ProgressCallback = ignore_progress,
    should_stop: StopCallback = never_stop,
) -> BatchSummary:
    """Find the scans under ``inputs``, predict each with the run and write ``out/<case_id>/``.

    Scans are found as those of a dataset; ``series`` keeps the DICOM series with this UID, number
    or description. See ``predict_references`` for what is written and raised. The run is checked
    before the search and loaded after it. Raises UsageError for a path or run that is not there,
    InputError if there is no scan or no such series.
    """
    config = check_run(run, engine)
    config_sha256 = hashlib.sha256(config.model_dump_json().encode()).hexdigest()
    on_progress(Progress("find scans", 0, 0, "scans"))
    references, skipped = find_dataset_scans(Path(inputs))
    references = choose_series(references, series, inputs)
    predictor = load_predictor(run, engine, device, score_thresh)
    return predict_references(
        predictor,
        references,
        out,
        skipped=skipped,
        settings={"score_thresh": score_thresh, "detector_sha256": config_sha256},
        window_hu=config.stack.window_hu,
        overwrite=overwrite,
        on_progress=on_progress,
        should_stop=should_stop,
    )


def predict_references(
    predictor: ScanPredictor,
    references: Sequence[ScanReference],
    out: Path,
    *,
    skipped: Sequence[tuple[str, str]] = (),
    settings: dict[str, Any] | None = None,
    window_hu: tuple[float, float] | None = None,
    overwrite: bool = False,
    on_progress: ProgressCallback = ignore_progress,
    should_stop: StopCallback = never_stop,
) -> BatchSummary:
    """Predict scans one by one and write a folder each, then ``out/summary.json``.

    A folder appears whole or not at all: findings.json, findings.csv, findings.nii.gz,
    finding_01.png and so on, source.json. One that is there from the same weights, settings and
    scan files is kept unless ``overwrite``. A scan that fails is recorded and the rest goes on.
    Raises ResourceError when memory or disk run out, and Interrupted after the scan at work when
    ``should_stop`` returns a signal; the same call then goes on where it stopped.
    """
    work = _Work(predictor, out, settings or {}, window_hu, overwrite, on_progress)
    started = time.monotonic()
    outcomes: list[CaseOutcome] = []
    out.mkdir(parents=True, exist_ok=True)

    def summarise(complete: bool) -> BatchSummary:
        seconds = round(time.monotonic() - started, 3)
        summary = BatchSummary(out, tuple(outcomes), tuple(skipped), seconds)
        _write_summary(summary, predictor.about, len(references), complete)
        return summary

    for number, reference in enumerate(references):
        signal = should_stop()
        if signal is not None:
            summarise(complete=False)
            raise Interrupted(
                f"Stopped after {number} of {len(references)} scans.",
                signal_number=signal,
                do="Run the same command again; finished scans are kept.",
            )
        on_progress(Progress("scans", number, len(references), "scans", reference.case_id))
        try:
            outcomes.append(work.one(reference))
        except ResourceError:
            with suppress(OSError):
                summarise(complete=False)
            raise
    on_progress(Progress("scans", len(references), len(references), "scans"))
    return summarise(complete=True)


@dataclass(frozen=True)
class _Work:
    """What is the same for all scans of a batch."""

    predictor: ScanPredictor
    out: Path
    settings: dict[str, Any]
    window_hu: tuple[float, float] | None
    overwrite: bool
    on_progress: ProgressCallback

    def one(self, reference: ScanReference) -> CaseOutcome:
        """Predict one scan. Raises ResourceError and Interrupted; all else becomes an outcome."""
        started = time.monotonic()
        name = folder_name(reference.case_id)
        try:
            source = self._source(reference)
            counts = None if self.overwrite else count_kept(self.out / name, source)
            if counts is not None:
                return CaseOutcome(reference.case_id, "kept", name, *counts, _since(started))
            replaced = not self.overwrite and (self.out / name / "findings.json").exists()
            counts, notes = self._predict(reference, name, source)
        except (ResourceError, Interrupted):
            raise
        except Exception as error:
            _raise_if_exhausted(error, reference)
            reason = _reason(error)
            _LOG.error("%s failed: %s\n%s", reference.case_id, reason, traceback.format_exc())
            return CaseOutcome(reference.case_id, "failed", seconds=_since(started), reason=reason)
        return CaseOutcome(
            reference.case_id,
            "done",
            name,
            *counts,
            _since(started),
            replaced=replaced,
            notes=notes,
        )

    def _source(self, reference: ScanReference) -> dict[str, Any]:
        """Return what decides about the outcome: the scan's files, the weights, the settings."""
        digest = hashlib.sha256()
        for file in sorted(reference.files or (reference.path,)):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return {
            "case_id": reference.case_id,
            "path": str(reference.path.resolve()),
            "kind": reference.kind,
            "files": len(reference.files) or 1,
            "files_state_sha256": digest.hexdigest(),
            "model": self.predictor.about,
            "settings": self.settings,
        }

    def _predict(
        self, reference: ScanReference, name: str, source: dict[str, Any]
    ) -> tuple[tuple[int, int], tuple[str, ...]]:
        """Return the numbers of findings and candidates, and what was repaired or assumed."""
        volume = read_reference(reference, on_progress=self.on_progress)
        found = self.predictor(volume, case_id=reference.case_id, on_progress=self.on_progress)
        write_case_folder(self.out / name, volume, found, source, self.window_hu)
        return (len(found.findings), len(found.candidates)), volume.notes


def _raise_if_exhausted(error: Exception, reference: ScanReference) -> None:
    """Raise ResourceError if memory or disk ran out: the next scan would only fail too."""
    if ran_out_of_memory(error):
        raise ResourceError(
            "Memory ran out.",
            where=reference.path,
            do="Close other programs, use --device cpu, or crop the scan.",
        ) from error
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        raise ResourceError(
            "The disk is full.",
            where=error.filename,
            why=error.strerror,
            do="Free some space and run the same command again; finished scans are kept.",
        ) from error


def _reason(error: Exception) -> str:
    """Return an error on one line."""
    text = str(error) if isinstance(error, MedvisionError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _write_summary(
    summary: BatchSummary, model: dict[str, str], scans: int, complete: bool
) -> None:
    counts = {status: len(summary.with_status(status)) for status in ("done", "kept", "failed")}
    document = {
        "schema_version": "1",
        "intended_use": INTENDED_USE,
        "model": model,
        "complete": complete,
        "counts": {"scans": scans, **counts},
        "seconds": summary.seconds,
        "cases": [asdict(outcome) for outcome in summary.outcomes],
        "skipped": [{"path": path, "reason": reason} for path, reason in summary.skipped],
    }
    atomic_write_text(summary.out / SUMMARY_FILE, _json(document))


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"
