"""medvision export: write a trained network as a graph that other programs run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medvision.cli.options import (
    Debug,
    Json,
    Quiet,
    check_holds_scan,
    check_output_file,
    check_run,
    check_writable,
    epilog,
)
from medvision.cli.session import Session

EPILOG = epilog(
    "medvision export runs/nodules",
    "medvision export runs/nodules --format torchscript -o nodules.pt",
    "medvision export runs/nodules --check scan.nii.gz",
)


class Format(StrEnum):
    """What a graph is written as."""

    onnx = "onnx"
    torchscript = "torchscript"


_ENDINGS = {Format.onnx: (".onnx",), Format.torchscript: (".pt", ".pth", ".ts", ".torchscript")}


def export(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that medvision train wrote.")],
    format: Annotated[  # noqa: A002  (the option's name)
        Format,
        typer.Option("--format", help="What to write: onnx or torchscript."),
    ] = Format.onnx,
    file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write, ending in .onnx or .pt by its format; RUN/model.onnx or RUN/model.pt "
            "if not given. Its settings go into FILE.json.",
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="SCAN",
            help="Scan to compare the outputs on; if not given, training scans cached in RUN, "
            "else a computed phantom.",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a trained network as a graph that other programs run.

    The graph takes any height and width that is a multiple of the coarsest stride, and any number
    of stacks at a time; that of a two-stage model takes one. Its outputs are compared with the
    network's own; if one differs by more than 1e-4 (of its size, if that is over 1), no file is
    left and the exit code is 3. medvision predict --engine onnx runs an ONNX file.
    """
    session: Session = context.obj
    session.start(json=json, quiet=quiet, debug=debug)
    check_run(run)
    if check is not None:
        check_holds_scan(check)
    if file is not None:
        check_output_file(file, endings=_ENDINGS[format])
    check_writable(file.parent if file is not None else run)
    from medvision.export.files import EXPORT_PACKAGES, require_packages, settings_path

    if format is Format.onnx:
        require_packages(EXPORT_PACKAGES, "Export to ONNX")
    from medvision.export.graph import export_run

    with session.work() as (on_progress, _):
        done = export_run(run, file, format.value, check=check, on_progress=on_progress)
    checked, on_onnx = done.model.check, format is Format.onnx
    source = run if done.file.parent == run and file is None else done.file
    following = f"medvision predict {source} SCANS -o out --engine onnx" if on_onnx else None
    session.finish(
        f"Exported to {format.value}",
        {
            "checked on": f"{checked.slices} slices of {checked.source}",
            "difference": f"{checked.largest_difference:.1e} at most, {checked.tolerance:g} allowed",
            "input": f"{done.model.input_name} {done.model.input_layout}",
            "outputs": ", ".join(done.model.outputs),
            "output": done.file,
            "settings": settings_path(done.file),
            "next": following,
        },
        {
            "output": done.file,
            "settings": settings_path(done.file),
            "check": checked,
            "outputs": done.model.outputs,
            "next": following,
        },
    )
