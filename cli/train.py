"""medvision train: learn to find lesions from a folder of labelled scans."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvision.cli.errors import complain_of
from medvision.cli.options import (
    Debug,
    Json,
    Quiet,
    check_holds_scan,
    check_new_run,
    check_writable,
    epilog,
    known_device,
)
from medvision.cli.session import Session
from medvision.cli.settings import resolve_config
from medvision.errors import UsageError

if TYPE_CHECKING:
    from medvision.training.config import TrainConfig
    from medvision.training.train import TrainSummary

EPILOG = epilog(
    "medvision train data/train -o runs/nodules",
    "medvision train data/train -o runs/nodules --set sampling.crop_size=128",
    "medvision train data/train -o runs/nodules --resume",
    "medvision train data/train -o runs/nodules --dry-run",
    "medvision train --schema > settings.schema.json",
)


class Model(StrEnum):
    """Models by the names of medvision.models.family_config, which a help page must not import."""

    retinanet = "retinanet"
    faster_rcnn = "faster-rcnn"
    mask_rcnn = "mask-rcnn"
    retina_unet = "retina-unet"
    unet = "unet"


class Transfer(StrEnum):
    """Ways of transfer by the names of medvision.training.transfer."""

    auto = "auto"
    probe = "probe"
    frozen = "frozen"
    finetune = "finetune"
    scratch = "scratch"


# As in TrainConfig; written here because a help page must not import it. A test compares them.
DEFAULTS = {
    "model": "retinanet",
    "transfer": "auto",
    "steps": "2200",
    "max_minutes": "14.25",
    "seed": "0",
    "device": "auto",
}


def _print_schema(wanted: bool) -> None:
    if wanted:
        import json

        from medvision.training.config import TrainConfig
        from medvision.training.settings_help import settings_schema

        print(json.dumps(settings_schema(TrainConfig), indent=2, allow_nan=False))
        raise typer.Exit


def train(
    context: typer.Context,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Folder with scans/ and labels/ in it.")
    ],
    run: Annotated[
        Path, typer.Option("--output", "-o", metavar="RUN", help="Folder for the trained model.")
    ],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings in a YAML file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be repeated."),
    ] = None,
    model: Annotated[
        Model | None,
        typer.Option(help=f"Which network; {DEFAULTS['model']} if not given."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Pretrained weights of the backbone: imagenet, another published name, or a "
            "safetensors or state-dict file; none if not given.",
        ),
    ] = None,
    transfer: Annotated[
        Transfer | None,
        typer.Option(
            help="What of pretrained weights learns: the outputs alone (probe), all but the "
            "backbone (frozen), all, the backbone later and slower (finetune), or what the number "
            f"of lesions a class allows; {DEFAULTS['transfer']} if not given.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help=f"Batches to train on; {DEFAULTS['steps']} if not given."
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0,
            help="Finish in this time even if steps are left; "
            f"{DEFAULTS['max_minutes']} if not given, 0 for no limit.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help=f"Seed of all that is random; {DEFAULTS['seed']} if not given."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            callback=known_device,
            help="Where to compute: auto, cpu, cuda, cuda:N or mps; "
            f"{DEFAULTS['device']} if not given.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the interrupted run in RUN, which must hold one."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what the run would be: settings and their sources, data, network, "
            "time and memory. RUN is left as it is.",
        ),
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            is_eager=True,
            callback=_print_schema,
            help="Print the JSON Schema of a settings file, and end; DATA and RUN are not needed.",
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Train a lesion detector on a folder of labelled scans.

    Settings are taken from the defaults, then from --config, then from --set and the other
    options; with --resume from the run itself. A scan whose labels hold no lesion is healthy; a
    scan without labels is left out and named, and so is one that cannot be used, with exit code 4.
    A run that is interrupted is saved, and goes on with --resume.
    """
    session: Session = context.obj
    session.start(json=json, quiet=quiet, debug=debug)
    check_holds_scan(data, do=f"Put scans into {data / 'scans'} and labels into {data / 'labels'}.")
    check_new_run(run, resume=resume)
    check_writable(run)
    chosen = {
        "model.name": model.value if model else None,
        "weights": weights,
        "transfer": transfer.value if transfer else None,
        "steps": steps,
        "max_minutes": max_minutes,
        "seed": seed,
        "device": device,
    }
    if resume and config is None:
        config = _settings_of(run)
        if config is not None and model is not None:
            _check_same_model(config, model)
    train_config, sources = resolve_config(config, settings or [], chosen)
    if dry_run:
        return _dry_run(session, data, train_config, sources)
    session.log_in(run)
    from medvision.training.train import train as train_model

    with session.work() as (on_progress, should_stop):
        done = train_model(
            data, run, train_config, resume=resume, on_progress=on_progress, should_stop=should_stop
        )
    following = f"medvision predict {run} SCANS -o out"
    _tell_left_out(session, done.left_out)
    lesions = ", ".join(f"{count} {name}" for name, count in done.lesions.items())
    return session.finish(
        "Finished before: nothing was left to train" if done.was_finished else "Trained",
        {
            "steps": _steps(done),
            "scans": f"{done.training_scans} to train on, {done.validation_scans} held out",
            "lesions": lesions,
            "transfer": done.transfer if train_config.weights else None,
            "left out": f"{len(done.left_out)}, reasons above" if done.left_out else None,
            "held-out CPM": _held_out(done),
            "sensitivity": _rounded(done.validation_sensitivity_at_1_fp, " at 1 false positive"),
            "proposal recall": _rounded(done.proposal_recall, " of the lesions' boxes"),
            "output": run,
            "log": session.log_path,
            "next": following,
        },
        {"summary": done, "output": run, "next": following},
        exit_code=4 if done.refused else 0,
    )


def _held_out(done: TrainSummary) -> str | None:
    if done.validation_cpm is not None or done.was_finished:
        return _rounded(done.validation_cpm)
    if not done.validation_scans:
        return None
    return "none: no lesion was held out, so nothing says which weights are best: the last are kept"


def _steps(done: TrainSummary) -> str:
    ended = ""
    if done.steps < done.planned_steps:
        ended = ": those that fitted into the time limit (--max-minutes)"
    return f"{done.steps} of {done.planned_steps}, on {done.device}{ended}"


def _tell_left_out(session: Session, left_out: tuple[tuple[str, str], ...]) -> None:
    """Name what was left out on stderr, the first ones, and all of it in the log."""
    for case_id, reason in left_out:
        session.log(f"left out {case_id}: {reason}")
    reasons = [f"{case_id}: {reason}" for case_id, reason in left_out]
    complain_of("Left out", reasons, "the document of --json")


def _settings_of(run: Path) -> Path | None:
    from medvision.training.config import CONFIG_FILE

    file = run / CONFIG_FILE
    return file if file.is_file() else None


def _check_same_model(config: Path, model: Model) -> None:
    """Raise UsageError if the run's settings are of another model: it would not know most of them."""
    from medvision.training.config import read_settings

    part = read_settings(config).get("model")
    started = part.get("name", DEFAULTS["model"]) if isinstance(part, dict) else DEFAULTS["model"]
    if started != model.value:
        raise UsageError(
            f"The run was started with --model {started}, not {model.value}.",
            where=config,
            do="Leave out --model, or train into a new folder.",
        )


def _dry_run(session: Session, data: Path, config: TrainConfig, sources: dict[str, str]) -> int:
    from medvision.cli.dry_run import print_dry_run
    from medvision.training.dry_run import dry_run
    from medvision.training.settings_help import settings_schema

    with session.work() as (on_progress, should_stop):
        found = dry_run(data, config, sources, on_progress=on_progress, should_stop=should_stop)
    if not session.json:
        print_dry_run(found)
    _tell_left_out(session, found.left_out)
    return session.finish(
        "Nothing was written: this was a dry run",
        {"next": "the same command without --dry-run"},
        {"dry_run": found, "settings_schema": settings_schema(type(config))},
        exit_code=4 if found.refused else 0,
    )


def _rounded(score: float | None, remark: str = "") -> str | None:
    return None if score is None else f"{score:.3f}{remark}"
