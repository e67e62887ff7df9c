"""medvision doctor: say whether this machine and installation have what medvision needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvision.cli.options import Debug, Json, Quiet, epilog
from medvision.cli.session import Session

EPILOG = epilog("medvision doctor", "medvision doctor --json > doctor.json")
_MARKS = {"ok": "ok", "note": "--", "failed": "FAILED"}


def doctor(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Where results will go."),
    ] = Path(),
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out decoding and graphics, which take seconds.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Check that this machine has what medvision needs.

    It looks at packages, processor, graphics processor, memory and disk, writes a file to FOLDER
    and removes it, and decodes a small sample in each DICOM transfer syntax. Exit code 3 means
    that something needed fails.
    """
    session: Session = context.obj
    session.start(json=json, quiet=quiet, debug=debug)
    from medvision.doctor import diagnose

    with session.work() as (on_progress, _):
        diagnosis = diagnose(folder, quick=quick, on_progress=on_progress)
    if not session.json:
        for section in diagnosis.sections:
            print(section.title)
            for check in section.checks:
                print(f"  {_MARKS[check.status]:<6}  {check.name:<26}  {check.detail}")
                if check.remedy and check.status != "ok":
                    print(f"{'':36}  {check.remedy}")
    failures = [check.name for check in diagnosis.failures]
    verdict = f"Failed: {', '.join(failures)}" if failures else "Everything needed is here"
    return session.finish(
        verdict,
        {"next": None if failures else "medvision sample data/"},
        {"ok": diagnosis.ok, "sections": diagnosis.sections},
        exit_code=0 if diagnosis.ok else 3,
    )
