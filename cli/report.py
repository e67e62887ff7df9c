"""medvision report: compare findings with the truth, and write it up as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvision.cli.errors import complain_of
from medvision.cli.options import (
    Debug,
    Json,
    Quiet,
    check_filled,
    check_output_file,
    check_writable,
    epilog,
)
from medvision.cli.session import Session
from medvision.errors import InputError
from medvision.progress import Progress

if TYPE_CHECKING:
    from medvision.evaluation.results import Evaluation
    from medvision.report.load import LoadedCases

EPILOG = epilog("medvision report out --truth data/series_truth -o out/report.html")


def report(
    context: typer.Context,
    findings: Annotated[
        Path, typer.Argument(help="Output folder of medvision predict.", metavar="FINDINGS")
    ],
    truth: Annotated[
        Path, typer.Option("--truth", metavar="LABELS", help="Folder with the reference labels.")
    ],
    page: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The HTML page to write; its log and its figures (.json) go beside it.",
        ),
    ],
    scans: Annotated[
        Path | None,
        typer.Option(metavar="SCANS", help="The scans, for the pictures in the page."),
    ] = None,
    operating_fp: Annotated[
        float,
        typer.Option(
            metavar="RATE",
            min=0,
            help="False positives per scan allowed where errors are counted.",
        ),
    ] = 1.0,
    bootstrap: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Bootstrap samples for the 95 % intervals; 0 for none."
        ),
    ] = 1000,
    title: Annotated[
        str, typer.Option(metavar="TEXT", help="Heading of the page.")
    ] = "Lesion detection report",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Compare findings with the truth, class by class.

    The HTML page has its pictures in it: sensitivity against false positives per scan with
    intervals, the errors of each class, each missed lesion and the worst false positives. Scans without
    a label file are not counted.
    """
    session: Session = context.obj
    session.start(json=json, quiet=quiet, debug=debug)
    check_filled(findings, "The folder of findings")
    check_filled(truth, "The folder of labels")
    if scans is not None:
        check_filled(scans, "The folder of scans")
    check_output_file(page, endings=(".html", ".htm"))
    check_writable(page.parent)
    session.log_in(page.parent, f"{page.stem}.log")
    from medvision.evaluation.evaluate import evaluate
    from medvision.report.load import image_reader, load_cases
    from medvision.report.page import write_report

    with session.work() as (on_progress, _):
        on_progress(Progress("report", 0, 3, "parts", "reading"))
        loaded = load_cases(findings, truth)
        if not loaded.cases:
            raise _nothing_to_compare(loaded, truth)
        on_progress(Progress("report", 1, 3, "parts", "comparing"))
        names = loaded.class_names
        scores = evaluate(
            loaded.cases, class_names=names, operating_fp=operating_fp, draws=bootstrap
        )
        on_progress(Progress("report", 2, 3, "parts", "writing"))
        html, data = write_report(
            scores,
            loaded.cases,
            page,
            images=image_reader(loaded, scans),
            title=title,
            model=loaded.model,
            without_truth=loaded.without_truth,
            without_findings=loaded.without_findings,
            problems=loaded.problems,
        )
        on_progress(Progress("report", 3, 3, "parts"))
    complain_of("Problem", loaded.problems, "report.json")
    files = {"report": html, "data": data}
    return session.finish(
        f"{scores.scans} scans compared",
        {**_counts(scores, loaded), **files, "next": f"open {html} in a browser"},
        {"evaluation": scores, "problems": loaded.problems, **files},
        exit_code=4 if loaded.problems else 0,
    )


def _nothing_to_compare(loaded: LoadedCases, truth: Path) -> InputError:
    return InputError(
        "No scan has both findings and labels.",
        where=truth,
        why=_left_out(loaded),
        do="Name each label file after its scan; of DICOM, after the SeriesInstanceUID.",
    )


def _counts(scores: Evaluation, loaded: LoadedCases) -> dict[str, object]:
    point = scores.operating
    # The report has an operating point of its own: candidates above it count here, findings below do not.
    at = "" if point.threshold is None else f", counted from score {point.threshold:.2f} up"
    return {
        "lesions": f"{point.detected} of {scores.lesions} found, {point.missed} missed",
        "false positives": f"{point.false_positives}, {point.fp_per_scan:.2f} per scan{at}",
        "healthy scans": scores.healthy_scans,
        "left out": _left_out(loaded),
    }


def _left_out(loaded: LoadedCases) -> str | None:
    counts = {
        "scans without labels": len(loaded.without_truth),
        "labels without findings": len(loaded.without_findings),
        "problems": len(loaded.problems),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or None
