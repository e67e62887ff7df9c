"""Settings explained: their dotted names, the nearest known one, their JSON Schema, their sources.

Read without torch, and without pydantic until a model is passed in.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel

DEFAULT = "default"
_NEAR = 0.6
"""Likeness (difflib's ratio, 0..1) from which a name is offered; difflib's own cutoff."""
_LISTED = 8
"""So many names are listed where none is near."""
_MUCH_LESS = 0.15
"""A name so much less alike than the best is not offered beside it."""

_UNET_NAMES = {
    "backbone": "encoder",
    "norm": "encoder_norm",
    "stage_convolution": "encoder_convolution",
    "segmentation_loss": "loss",
}
"""What the U-Net calls otherwise than the models on a pyramid."""
_COUNTERPARTS = {**_UNET_NAMES, **{unet: other for other, unet in _UNET_NAMES.items()}}


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


def table_names(model: type[BaseModel]) -> list[str]:
    """Return the settings of ``model`` itself that hold values under names of the user's, as of classes."""
    fields = model.model_fields.items()
    return [name for name, field in fields if get_origin(field.annotation) is dict]


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
    if close:
        return f"Did you mean {', '.join(close)}?"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"Known: {', '.join(known[:_LISTED])}{more}."


class _Choice(NamedTuple):
    """A part that may be one of several models: its dotted name, the tag that was chosen, and all models."""

    part: str
    tag: str
    models: list[type[BaseModel]]

    def tags_with(self, key: str) -> list[str]:
        """Return the tags of the models that have ``key``, a setting or a table of them."""
        named = {_tag_of(one): setting_names(one, f"{self.part}.") for one in self.models}
        return [tag for tag, names in named.items() if key in {*names, *_tables(names)}]


def unknown_in_file(location: Iterable[object], model: type[BaseModel]) -> tuple[str, str]:
    """Return the dotted name of a setting that a file has and ``model`` does not know, and what to do.

    ``location`` is pydantic's path to it. Names of whole parts are offered too.
    """
    parts, choice, here = _without_tags([str(part) for part in location], model)
    key = ".".join(parts)
    everywhere = setting_names(model)
    having = choice.tags_with(key) if choice else []
    if choice and having and choice.tag not in having:
        return key, _of_others(key, choice, having, here)
    if key in everywhere:  # a dotted name written as one key
        return key, f"In a file, parts are tables: write {_as_table(key)}."
    inside = [f"{'.'.join(parts[:-1])}.{name}" for one in here for name in setting_names(one)]
    known = [*inside, *everywhere] if choice is None else inside
    return key, suggestion(key, {*known, *_tables(known)})


def dotted_name(location: Iterable[object], model: type[BaseModel]) -> str:
    """Return the dotted name of the setting or part at pydantic's path ``location``, empty for the whole."""
    path = [str(part) for part in location]
    if not path:
        return ""
    parts, _, here = _without_tags(path, model)
    # The path to a part that may be one of several models ends in the tag of the one that was chosen.
    chosen = any(_tag_of(one) == parts[-1] for one in here if parts[-1] not in one.model_fields)
    return ".".join(parts[:-1] if chosen else parts)


def _of_others(key: str, choice: _Choice, having: list[str], here: list[type[BaseModel]]) -> str:
    """Return what to do about a setting that the models of the tags ``having`` know, but not the chosen."""
    of = f"It is a setting of {', '.join(having)}"
    other_name = _COUNTERPARTS.get(_last(key))
    if any(other_name in one.model_fields for one in here):
        return f"{of}; {choice.tag} calls it {choice.part}.{other_name}."
    return f"{of}, not of {choice.tag}: leave it out, or take another {choice.part}."


def _tables(names: Iterable[str]) -> set[str]:
    """Return the names of the parts that hold the settings ``names``."""
    return {name.rpartition(".")[0] for name in names if "." in name}


def _without_tags(
    location: list[str], model: type[BaseModel]
) -> tuple[list[str], _Choice | None, list[type[BaseModel]]]:
    """Return the dotted name's parts, the choice between models it is in, and the models that are there.

    Where a part may be one of several models, pydantic's path has the tag of the one that was chosen: no
    dotted name has it. Without such a part there is no choice.
    """
    parts, choice, here = [], None, [model]
    for part in location[:-1]:
        fields = [one.model_fields[part] for one in here if part in one.model_fields]
        if fields:
            parts.append(part)
            here = [found for field in fields for found in _models_in(field.annotation)]
        else:
            choice = _Choice(".".join(parts), part, here)
            here = [one for one in here if _tag_of(one) == part] or here
    return [*parts, location[-1]], choice, here if parts else []


def _tag_of(model: type[BaseModel]) -> str:
    """Return how pydantic's paths name a model that a part may be: by its name, or else by its class."""
    field = model.model_fields.get("name")
    return model.__name__ if field is None else str(field.default)


def settings_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a YAML or JSON file of settings, for editors to check.

    It knows every name, and the type and limits of each value. It passes what only a check in code
    refuses, such as values that do not fit each other. It refuses a number or a truth value written as
    text, which a run would read.
    """
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
