"""medvision predict: find lesions in scans with a trained model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medvision.cli.errors import complain_of
from medvision.cli.options import (
    Debug,
    Device,
    Json,
    Quiet,
    check_exists,
    check_holds_scan,
    check_run,
    check_writable,
    epilog,
)
from medvision.cli.session import Session
from medvision.errors import UsageError

EPILOG = epilog(
    "medvision predict runs/nodules data/series -o out",
    "medvision predict runs/nodules scan.nii.gz -o out --score-thresh 0.3",
    "medvision predict runs/nodules data/series -o out --engine onnx",
)


class Engine(StrEnum):
    """What runs the network."""

    torch = "torch"
    onnx = "onnx"


def predict(
    context: typer.Context,
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder that medvision train wrote; with --engine onnx also a file that "
            "medvision export wrote.",
        ),
    ],
    scans: Annotated[
        Path,
        typer.Argument(
            metavar="SCANS",
            help="A DICOM folder; a .nii.gz, .mha or .nrrd file; or a folder of these.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the findings.")
    ],
    series: Annotated[
        str | None,
        typer.Option(
            metavar="SERIES", help="Only the DICOM series of this UID, number or description."
        ),
    ] = None,
    score_thresh: Annotated[
        float | None,
        typer.Option(
            metavar="SCORE",
            min=0,
            max=1,
            help="Lowest score of a finding; if not given, as training found it. What scores less "
            "is listed in findings.json as a candidate.",
        ),
    ] = None,
    device: Device = "auto",
    engine: Annotated[
        Engine,
        typer.Option(
            help="What runs the network: torch, or onnx for RUN/model.onnx in ONNX Runtime."
        ),
    ] = Engine.torch,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Compute again also what OUT holds already of the same model, settings and scan.",
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Find lesions in scans with a trained model.

    The findings of each scan are written to a folder in OUT, as tables and as files that viewers
    open. A scan that is refused does not stop the others; it is listed at the end.
    """
    session: Session = context.obj
    session.start(json=json, quiet=quiet, debug=debug)
    _check_engine(run, engine)
    check_holds_scan(scans)
    check_writable(out)
    session.log_in(out)
    from medvision.batch import predict_scans

    with session.work() as (on_progress, should_stop):
        batch = predict_scans(
            run,
            scans,
            out,
            series=series,
            device=device,
            score_thresh=score_thresh,
            on_progress=on_progress,
            should_stop=should_stop,
            overwrite=overwrite,
            engine=engine.value,
        )
    done, kept, failed = (batch.with_status(status) for status in ("done", "kept", "failed"))
    notes = [f"{one.case_id}: {note}" for one in done for note in one.notes]
    complain_of("Failed", [f"{one.case_id}: {one.reason}" for one in failed], "summary.json")
    complain_of("Note", notes, "summary.json")
    replaced = sum(one.replaced for one in done)
    usable = [*done, *kept]
    healthy = sum(one.findings == 0 for one in usable)
    following = f"medvision report {out} --truth LABELS -o {out / 'report.html'}"
    return session.finish(
        f"{len(usable)} of {len(batch.outcomes)} scans done",
        {
            "findings": sum(one.findings for one in usable),
            "candidates": f"{sum(one.candidates for one in usable)} that score less, in findings.json",
            "scans": f"{len(usable) - healthy} with findings, {healthy} without",
            "notes": f"{len(notes)}, in {out / 'summary.json'}" if notes else None,
            "kept": f"{len(kept)} were there already" if kept else None,
            "replaced": f"{replaced}, of another model, other settings or files"
            if replaced
            else None,
            "failed": f"{len(failed)}, reasons in {out / 'summary.json'}" if failed else None,
            "skipped": f"{len(batch.skipped)} paths that are no scan" if batch.skipped else None,
            "output": out,
            "log": session.log_path,
            "next": following if usable else None,
        },
        {"summary": batch, "output": out, "next": following if usable else None},
        exit_code=(4 if usable else 3) if failed else 0,
    )


def _check_engine(run: Path, engine: Engine) -> None:
    """Raise UsageError if ``run`` is nothing that the engine runs, or the engine is not installed."""
    if engine is Engine.torch:
        if run.suffix == ".onnx" and run.is_file():
            raise UsageError("This is an exported model.", where=run, do="Pass --engine onnx.")
        check_run(run)
        return
    check_exists(run, "The run folder or exported file")
    from medvision.export.engines import check_run as check_engine

    check_engine(run, engine.value)
