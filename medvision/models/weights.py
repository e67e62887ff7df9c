"""Pretrained weights of a backbone: by name, or from a file. No code is run from a file."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from medvision.errors import InputError, UsageError
from medvision.files import sha256_of
from medvision.models.backbone import Backbone
from medvision.models.backbones import PLAIN_INPUT, Colours, build_backbone, expected_input
from medvision.models.choices import NARROW
from medvision.models.efficientnet_lite import efficientnet_lite_names, find_packaged
from medvision.models.first_convolution import (
    COLOURS,
    adapt_first_convolution,
    fold_input_scale,
)
from medvision.models.timm_backbone import TIMM_PREFIX

DEFAULT_WEIGHTS = "imagenet"
"""The name of the best weights that the backbone's own package has for it."""

_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_PREFIXES = ("", "backbone.", "encoder.", "network.backbone.", "backbone.body.", "body.")
_OWN_PARTS = ("pyramid.lateral.", "architecture")
"""Beginnings of names that only whole networks of medvision have."""
_OWN = ("num_batches_tracked", "offset_weight", "offset_bias")
"""Entries that published weights need not have: a counter, and what only deformable layers learn."""


@dataclass(frozen=True)
class Pretrained:
    """Tensors by name, where they are from, and the colours' mean and std that they expect (0..1)."""

    tensors: dict[str, Tensor]
    source: str
    mean: Colours = PLAIN_INPUT[0]
    std: Colours = PLAIN_INPUT[1]


def load_pretrained(backbone: Backbone, name: str, weights: str) -> str:
    """Put pretrained ``weights`` into ``backbone``, built as ``name``; return where they are from.

    ``weights`` is "imagenet", another name that torchvision has for weights of this model, or a file
    (:func:`read_weights`). The first convolution is adapted to the backbone's channels, and to
    images in -1..1. Raises UsageError if a download fails or a name is unknown, InputError if the
    file does not fit; the backbone is unchanged then.
    """
    found = find_pretrained(name, weights)
    backbone.load_state_dict(fit_weights(backbone, found))
    return found.source


def check_weights(name: str | None, weights: str | None) -> None:
    """Refuse before any work is done weights that cannot be for the backbone ``name``, a known one.

    Nothing is downloaded or read. UsageError.
    """
    if name is None or weights is None:
        return
    path = Path(weights)
    if path.is_dir():
        raise UsageError(
            "The weights must be a file; this is a folder.",
            where=path,
            do=f"For a run of medvision, give {path / 'best.safetensors'}.",
        )
    if path.suffix in _FILES or len(path.parts) > 1:
        if not path.is_file():
            raise UsageError("The file of weights must exist; it does not.", where=path)
    elif name == NARROW and not path.is_file():
        raise UsageError(
            f"There are no published weights of {NARROW}; got {weights!r}.",
            do="Choose a published backbone, such as resnet18, or give a file.",
        )


def find_pretrained(name: str, weights: str) -> Pretrained:
    """Return the weights of backbone ``name`` from a file, an installed package or a download."""
    path = Path(weights)
    if path.is_file() or path.suffix in _FILES or len(path.parts) > 1:
        tensors = read_weights(path)
        # A medvision run has learnt from images in -1..1; published weights from normalised ones.
        own = any(key.removeprefix("network.").startswith(_OWN_PARTS) for key in tensors)
        mean, std = PLAIN_INPUT if own else expected_input(name)
        return Pretrained(tensors, f"{path.name}, SHA-256 {sha256_of(path)}", mean, std)
    if name.startswith(TIMM_PREFIX):
        return _of_timm(name, weights)
    return _of_torchvision(name, weights)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file or a torch state dict.

    A state dict is read with ``weights_only=True``: what is not tensors in plain containers is
    refused, none of its code is run. UsageError without the file, InputError if it is neither kind.
    """
    if not path.is_file():
        raise UsageError("The file of weights must exist; it does not.", where=path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise InputError(
            "The weights must be a safetensors file or a torch state dict of tensors only.",
            where=path,
            why=_first_line(error),
            do="Save the model's state_dict() with safetensors.torch.save_file.",
        ) from error
    return _tensors_of(content, path)


def _tensors_of(content: object, path: Path) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if isinstance(content, Mapping):
        found = {
            str(name).removeprefix("module."): value
            for name, value in content.items()
            if isinstance(value, Tensor)
        }
        if found:
            return found
    raise InputError("The weights must be a table of tensors by name; none is in it.", where=path)


def fit_weights(backbone: Backbone, found: Pretrained) -> dict[str, Tensor]:
    """Return a whole state dict for ``backbone`` from tensors under the names of their own package.

    Names may begin with the backbone's place in a larger model, as in a medvision run; entries for
    other parts, such as the classifier, are left out. InputError if an entry is missing or has
    another shape.
    """
    wanted = backbone.state_dict()
    named = _under_wanted_names(wanted, found.tensors)
    convolution, norm = backbone.first_convolution, backbone.first_norm
    first = f"{convolution}.weight"
    if first in named and named[first].shape[1:2] == (COLOURS,):
        _fold(named, convolution, norm, found)
        if wanted[first].shape[1] != COLOURS:
            named[first] = adapt_first_convolution(named[first], wanted[first].shape[1])
    _check(wanted, named, found.source)
    return {name: named.get(name, value) for name, value in wanted.items()}


def _fold(named: dict[str, Tensor], convolution: str, norm: str, found: Pretrained) -> None:
    """Let weights made for normalised colours see -1..1."""
    if (found.mean, found.std) == PLAIN_INPUT:
        return
    weight, lacking = fold_input_scale(named[f"{convolution}.weight"], found.mean, found.std)
    named[f"{convolution}.weight"] = weight
    if f"{convolution}.bias" in named:
        named[f"{convolution}.bias"] = named[f"{convolution}.bias"] + lacking
    elif f"{norm}.running_mean" in named:
        named[f"{norm}.running_mean"] = named[f"{norm}.running_mean"] - lacking


def _under_wanted_names(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Find each wanted entry. timm flattens names ("stages.0" is "stages_0"), so dots do not count."""
    if "_conv_stem.weight" in tensors:
        lite = efficientnet_lite_names([name.removeprefix("body.") for name in wanted])
        joined = zip(wanted, lite.values(), strict=True)
        return {name: tensors[old] for name, old in joined if old in tensors}
    flat = {name.replace(".", "_"): value for name, value in tensors.items()}
    best: dict[str, Tensor] = {}
    for prefix, own in itertools.product(_PREFIXES, ("", "body.", "body.model.")):
        flattened = {name: (prefix + name.removeprefix(own)).replace(".", "_") for name in wanted}
        named = {name: flat[old] for name, old in flattened.items() if old in flat}
        best = named if len(named) > len(best) else best
    return best


def _check(wanted: Mapping[str, Tensor], named: Mapping[str, Tensor], source: str) -> None:
    needed = [name for name in wanted if not name.endswith(_OWN)]
    missing = [name for name in needed if name not in named]
    other = [name for name in needed if name in named and named[name].shape != wanted[name].shape]
    if not missing and not other:
        return
    why = f"{len(missing)} of {len(needed)} tensors are not in it, {', '.join(missing[:1])} first."
    if not missing:
        shapes = f"{tuple(named[other[0]].shape)}, not {tuple(wanted[other[0]].shape)}"
        why = f"{other[0]} has shape {shapes}."
    raise InputError(
        "The weights do not fit the backbone.",
        where=source,
        why=why,
        do="Choose the backbone that they were trained with.",
    )


def _of_timm(name: str, weights: str) -> Pretrained:
    if weights != DEFAULT_WEIGHTS:
        raise UsageError(
            f"Weights of {name} are named {DEFAULT_WEIGHTS!r}; got {weights!r}.",
            do="Name another tag with the model, as in timm/resnet18.a1_in1k, or give a file.",
        )
    packaged = find_packaged(name)
    if packaged is not None:
        return find_pretrained(name, str(packaged))
    build_backbone(name, COLOURS)  # refuses an unknown name before anything is downloaded
    import timm

    try:
        whole = timm.create_model(
            name.removeprefix(TIMM_PREFIX), pretrained=True, features_only=True
        )
    except Exception as error:  # the hub's client has errors of its own for every way to be offline
        raise _not_downloaded(name, "the Hugging Face hub", error) from error
    mean, std = expected_input(name)
    return Pretrained(whole.state_dict(), f"timm {timm.__version__}, {name}", mean, std)


def _of_torchvision(name: str, weights: str) -> Pretrained:
    try:
        entries = torchvision.models.get_model_weights(name)
    except ValueError:
        raise UsageError(
            f"There are no published weights of {name}; got {weights!r}.",
            do="Give a file of weights, or train from scratch.",
        ) from None
    names = list(entries.__members__)
    wanted = "DEFAULT" if weights == DEFAULT_WEIGHTS else weights
    if wanted not in names:
        near = difflib.get_close_matches(weights.upper(), names, 1)
        raise UsageError(
            f"{name} has no weights {weights!r}, and there is no such file.",
            do=f"Choose {', '.join((DEFAULT_WEIGHTS, *(near or names)))}, or give a file.",
        )
    entry = entries[wanted]
    try:
        tensors = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(name, entry.url, error) from error
    preset = entry.transforms()
    source = f"torchvision {torchvision.__version__}, {entry}"
    return Pretrained(tensors, source, tuple(preset.mean), tuple(preset.std))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _not_downloaded(name: str, place: str, error: Exception) -> UsageError:
    return UsageError(
        f"The weights of {name} could not be downloaded.",
        where=place,
        why=_first_line(error),
        do="Connect to the network, fetch the file elsewhere and pass --weights FILE, "
        "or train without --weights.",
    )
