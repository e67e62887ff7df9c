"""Where the settings of a training run come from: defaults, a file, --set and other options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvision.cli.options import check_exists
from medvision.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from medvision.training.config import TrainConfig


def build_config(
    file: Path | None, settings: list[str], options: Mapping[str, object]
) -> TrainConfig:
    """Merge defaults, file, --set pairs and the options that are not None; the later win.

    UsageError names the setting that is wrong.
    """
    from medvision.training.config import TrainConfig, load_train_config, make_train_config

    if file is not None:
        check_exists(file, "The settings file")
    base = load_train_config(file) if file else make_train_config({}, "the defaults")
    given = {name: value for name, value in options.items() if value is not None}
    changes = parse_settings(settings, setting_names(TrainConfig)) | given
    return make_train_config(merge_settings(base.model_dump(), changes), "--set and other options")


def setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the names of all settings of a pydantic model; parts are reached with dots."""
    names = []
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and hasattr(part, "model_fields"):
            names += setting_names(part, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def parse_settings(pairs: Iterable[str], known: Iterable[str]) -> dict[str, Any]:
    """Turn ``key=value`` texts into a dictionary; the values are read as YAML scalars or lists.

    Raises UsageError for a pair without ``=`` or a key that is not ``known``, with the nearest one.
    """
    import yaml

    names = sorted(known)
    settings = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark:
            raise UsageError("--set takes KEY=VALUE.", where=f"--set {pair}")
        if key not in names:
            raise UsageError(
                f"There is no setting {key!r}.", where=f"--set {pair}", do=_nearest(key, names)
            )
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError("The value is not valid YAML.", where=f"--set {pair}") from error
    return settings


def merge_settings(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested ``values`` with the settings of dotted names changed."""
    merged = dict(values)
    for name, value in changes.items():
        head, dot, rest = name.partition(".")
        merged[head] = merge_settings(merged[head], {rest: value}) if dot else value
    return merged


def _nearest(key: str, names: list[str]) -> str:
    # People write the last part alone, so a whole name that ends in it counts as near.
    ends = [name for name in names if name.rpartition(".")[2] == key]
    close = ends or difflib.get_close_matches(key, names, n=3)
    return f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(names)}."
