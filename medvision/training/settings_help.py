"""Settings explained: their dotted names, the nearest known one, their JSON Schema, their sources.

Read without torch, and without pydantic until a model is passed in.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel

DEFAULT = "default"
_NEAR = 0.6
"""Likeness (difflib's ratio, 0..1) from which a name is offered; difflib's own cutoff."""
_MUCH_LESS = 0.15
"""A name so much less alike than the best is not offered beside it."""


class Setting(NamedTuple):
    """One setting as a run will use it: its dotted name, its value, and where that came from."""

    name: str
    value: object
    source: str


def setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the names of all settings of a pydantic model; parts are reached with dots.

    Where a part may be one of several models, the names of all of them count.
    """
    names: dict[str, None] = {}
    for name, field in model.model_fields.items():
        parts = list(_models_in(field.annotation))
        for part in parts:
            names.update(dict.fromkeys(setting_names(part, f"{prefix}{name}.")))
        if not parts:
            names[prefix + name] = None
    return list(names)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models that an annotation such as ``A | B | None`` names."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        yield annotation
    elif not isinstance(annotation, type):
        # Values in containers are no parts: a dotted name does not reach them.
        for argument in get_args(annotation):
            yield from _models_in(argument)


def nearest_settings(key: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return the known names most like ``key``, best first.

    People write the last part of a name alone or in another part, so a name whose last part is that
    of ``key`` comes before all that are only alike.
    """
    known = sorted(names)
    last = _last(key)
    ends = [name for name in known if _last(name) == last]
    if ends:
        return sorted(ends, key=lambda name: -_likeness(key, name))[:most]
    likeness = {name: _likeness(key, name) for name in known}
    score = {name: max(likeness[name], _likeness(last, _last(name))) for name in known}
    best = max(score.values(), default=0.0)
    close = [name for name in known if score[name] >= max(_NEAR, best - _MUCH_LESS)]
    return sorted(close, key=lambda name: (-score[name], -likeness[name]))[:most]


def suggestion(key: str, names: Iterable[str]) -> str:
    """Return what to tell somebody who wrote ``key``, which is not among ``names``."""
    known = sorted(names)
    close = nearest_settings(key, known)
    return f"Did you mean {', '.join(close)}?" if close else f"Known: {', '.join(known)}."


def unknown_in_file(location: Iterable[object], model: type[BaseModel]) -> tuple[str, str]:
    """Return the dotted name of a setting that a file has and ``model`` does not know, and what to do.

    ``location`` is pydantic's path to it. Names of whole parts are offered too.
    """
    parts, kind, here = _without_tags([str(part) for part in location], model)
    key = ".".join(parts)
    everywhere = setting_names(model)
    if kind and key in everywhere:
        return key, f"Leave it out: {parts[0]} {kind} has no such setting, others have."
    if key in everywhere:  # a dotted name written as one key
        return key, f"In a file, parts are tables: write {_as_table(key)}."
    inside = [f"{'.'.join(parts[:-1])}.{name}" for one in here for name in setting_names(one)]
    known = [*inside, *everywhere] if not kind else inside
    tables = {name.rpartition(".")[0] for name in known if "." in name}
    return key, suggestion(key, {*known, *tables})


def _without_tags(
    location: list[str], model: type[BaseModel]
) -> tuple[list[str], str, list[type[BaseModel]]]:
    """Return the dotted name's parts, which kind of part it is in, and the models that are there.

    Where a part may be one of several models, pydantic's path has the tag of the one that was chosen: no
    dotted name has it. Without such a part the kind is empty.
    """
    parts, kind, here = [], "", [model]
    for part in location[:-1]:
        fields = [one.model_fields[part] for one in here if part in one.model_fields]
        if fields:
            parts.append(part)
            here = [found for field in fields for found in _models_in(field.annotation)]
        else:
            kind = part
            here = [one for one in here if _tag_of(one) == part] or here
    return [*parts, location[-1]], kind, here if parts else []


def _tag_of(model: type[BaseModel]) -> str:
    field = model.model_fields.get("name")
    return "" if field is None else str(field.default)


def settings_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a YAML or JSON file of settings, for editors to check."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **model.model_json_schema(),
    }


def list_settings(config: BaseModel, sources: Mapping[str, str]) -> list[Setting]:
    """Return all settings with their values in the order of the model.

    ``sources`` gives where a value came from by dotted name; what is not in it is a default.
    """
    return [
        Setting(name, value, sources.get(name, DEFAULT)) for name, value in flat_settings(config)
    ]


def flat_settings(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted name and the value of every setting of a built model."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if hasattr(type(value), "model_fields"):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def given_names(values: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return which dotted ``names`` a nested table of settings gives a value."""
    return [name for name in names if _gives(values, name)]


def _gives(values: Any, name: str) -> bool:
    head, dot, rest = name.partition(".")
    if not isinstance(values, Mapping) or head not in values:
        return False
    return _gives(values[head], rest) if dot else True


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _as_table(key: str) -> str:
    head, dot, rest = key.partition(".")
    return f"{head}: {{{_as_table(rest)}}}" if dot else f"{head}: ..."
