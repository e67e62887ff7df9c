"""Where the settings of a training run come from: defaults, a file, --set and other options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvision.cli.options import check_exists
from medvision.errors import UsageError
from medvision.training.settings_help import (
    given_names,
    nearest_settings,
    setting_names,
    suggestion,
    table_names,
)

if TYPE_CHECKING:
    from medvision.training.config import TrainConfig


def resolve_config(
    file: Path | None, settings: list[str], options: Mapping[str, object]
) -> tuple[TrainConfig, dict[str, str]]:
    """Merge defaults, file, --set pairs and the options that are not None; the later win.

    Returns the settings, and the source of every one that is no default. UsageError names the setting that
    is wrong.

    A source is the file's path, ``--set`` or the option, such as ``--max-minutes``. ``options`` may have
    dotted names; that of ``model.name`` is ``--model``.
    """
    from medvision.training.config import TrainConfig, make_train_config, read_settings

    if file is not None:
        check_exists(file, "The settings file")
    from_file = read_settings(file) if file else {}
    names = setting_names(TrainConfig)
    tables = table_names(TrainConfig)
    pairs = parse_settings(settings, names, tables)
    given = {name: value for name, value in options.items() if value is not None}
    # Checked as a whole: an option may give what a setting in the file asks for.
    changed = merge_settings(from_file, pairs | given)
    options_text = "--set and other options" if pairs or given else None
    where = [str(part) for part in (file, options_text) if part is not None]
    config = make_train_config(changed, " with ".join(where))
    sources = dict.fromkeys(given_names(from_file, names), str(file))
    sources |= {_part_of(key, tables): "--set" for key in pairs}
    sources |= {name: f"--{name.removesuffix('.name').replace('_', '-')}" for name in given}
    return config, sources


def parse_settings(
    pairs: Iterable[str], known: Iterable[str], tables: Sequence[str] = ()
) -> dict[str, Any]:
    """Turn ``key=value`` texts into a dictionary; the values are read as YAML.

    ``tables`` are the known settings that hold values under any names, such as those of classes. Raises
    UsageError for a pair without ``=`` or a key that is not ``known``, with the nearest one.
    """
    import yaml

    names = sorted(known)
    settings = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark:
            raise UsageError("--set takes KEY=VALUE.", where=f"--set {pair}")
        if _part_of(key, tables) not in names:
            raise UsageError(
                f"There is no setting {key!r}.", where=f"--set {pair}", do=_remedy(key, names)
            )
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError("The value is not valid YAML.", where=f"--set {pair}") from error
    return settings


def _remedy(key: str, names: Sequence[str]) -> str:
    inside = [name for name in names if name.startswith(f"{key}.")]
    if not inside:
        near = nearest_settings(key, names)
        return (
            suggestion(key, near) if near else "medvision train --schema describes all there are."
        )
    named = f"{key}.name"
    if named in inside:
        return f"It is a part with settings of its own; to choose which, set {named}."
    return (
        f"It is a part; set what is in it, as {inside[0]}=..., or give the part in a --config file."
    )


def _part_of(key: str, tables: Sequence[str]) -> str:
    """Return the table that ``key`` is a value of, else ``key``."""
    return next((table for table in tables if key.startswith(f"{table}.")), key)


def merge_settings(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested ``values`` with the settings of dotted names changed."""
    merged = dict(values)
    for name, value in changes.items():
        head, dot, rest = name.partition(".")
        if dot and not isinstance(merged.get(head, {}), Mapping):
            raise UsageError(
                f"Setting {head!r} must be a table of names and values; got {merged[head]!r}.",
                do=f"Write {head}: {{{rest}: ...}} in the file.",
            )
        merged[head] = merge_settings(merged.get(head, {}), {rest: value}) if dot else value
    return merged
