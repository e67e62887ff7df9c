"""The medvision command: assemble the sub-commands, run one, end with its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from medvision._version import __version__
from medvision.cli import doctor, export, predict, report, sample, train
from medvision.cli.options import Debug, Json, Quiet, epilog
from medvision.cli.session import Session

app = typer.Typer(
    name="medvision",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="sample", epilog=sample.EPILOG)(sample.sample)
app.command(name="train", epilog=train.EPILOG)(train.train)
app.command(name="predict", epilog=predict.EPILOG)(predict.predict)
app.command(name="export", epilog=export.EPILOG)(export.export)
app.command(name="report", epilog=report.EPILOG)(report.report)
app.command(name="doctor", epilog=doctor.EPILOG)(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medvision {__version__}")
        raise typer.Exit


@app.callback(
    epilog=epilog(
        "medvision sample data/",
        "medvision train data/train -o runs/nodules",
        "medvision predict runs/nodules data/series -o out",
        "medvision report out --truth data/series_truth -o out/report.html",
    )
)
def medvision(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find rare, small lesions in medical scans. For research, not for diagnosis."""
    context.obj.start(json=json, quiet=quiet, debug=debug)


def main(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    session = Session(arguments)
    try:
        code = app(list(arguments), prog_name="medvision", standalone_mode=False, obj=session)
    # Rust extensions panic with exceptions that are no Exception; SystemExit is typer's own.
    except SystemExit:
        raise
    except BaseException as error:
        return session.fail(error)
    return code if isinstance(code, int) else 0


def run() -> None:
    """Be the console script."""
    sys.exit(main(sys.argv[1:]))
