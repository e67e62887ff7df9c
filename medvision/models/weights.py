"""Pretrained weights of a backbone: by name, or from a file. No code is run from a file."""

from __future__ import annotations

import difflib
import itertools
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from medvision.errors import InputError, UsageError, first_line
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
_PREFIXES = (
    "",
    "backbone.",
    "encoder.",
    "network.backbone.",
    "network.encoder.",
    "backbone.body.",
    "body.",
)
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
    images in -1..1. Raises UsageError if a name is unknown, InputError if a
    download fails or the file does not fit; the backbone is unchanged then.
    """
    found = find_pretrained(name, weights)
    backbone.load_state_dict(fit_weights(backbone, found))
    return found.source


def check_weights(name: str | None, weights: str | None) -> None:
    """Refuse before any work is done weights that cannot be for the backbone ``name``, a known one.

    Published ones are downloaded, where they are not on this machine yet; a file is not read. UsageError;
    InputError if a download fails.
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
    elif not path.is_file():
        find_pretrained(name, weights)


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
            why=first_line(error),
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
    first = f"{backbone.first_convolution}.weight"
    if not backbone.first_convolution and (found.mean, found.std) != PLAIN_INPUT:
        raise _not_adaptable(found.source, "its first layer is no plain convolution of the image")
    if first in named and named[first].shape[1:2] == (COLOURS,):
        _fold(named, wanted, backbone, found)
        if wanted[first].shape[1] != COLOURS:
            named[first] = adapt_first_convolution(named[first], wanted[first].shape[1])
    _check(wanted, named, found.source, first)
    return {name: named.get(name, value) for name, value in wanted.items()}


def _fold(
    named: dict[str, Tensor], wanted: Mapping[str, Tensor], backbone: Backbone, found: Pretrained
) -> None:
    """Let weights made for normalised colours see -1..1."""
    first = backbone.first_convolution
    weight, bias, mean = f"{first}.weight", f"{first}.bias", f"{backbone.first_norm}.running_mean"
    if bias in wanted and f"{backbone.first_norm}.weight" in wanted and mean not in wanted:
        # Published with a batch norm, whose mean shifts as a bias does; a group norm has none.
        named.setdefault(bias, torch.zeros_like(wanted[bias]))
    if (found.mean, found.std) == PLAIN_INPUT:
        return
    named[weight], lacking = fold_input_scale(named[weight], found.mean, found.std)
    if bias in named:
        named[bias] = named[bias] + lacking
    elif mean in named:
        named[mean] = named[mean] - lacking
    else:
        raise _not_adaptable(found.source, "its first convolution has no bias or batch norm")


def _not_adaptable(source: str, why: str) -> InputError:
    return InputError(
        "The weights expect normalised colours, and cannot be adapted to slices.",
        where=source,
        why=f"In this backbone {why}.",
        do="Choose another backbone, such as resnet18.",
    )


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


def _check(
    wanted: Mapping[str, Tensor], named: Mapping[str, Tensor], source: str, first: str
) -> None:
    needed = [name for name in wanted if not name.endswith(_OWN)]
    missing = [name for name in needed if name not in named]
    other = [name for name in needed if name in named and named[name].shape != wanted[name].shape]
    if not missing and not other:
        return
    why = f"{len(missing)} of {len(needed)} tensors are not in it, {', '.join(missing[:1])} first."
    if not missing:
        shapes = f"{tuple(named[other[0]].shape)}, not {tuple(wanted[other[0]].shape)}"
        why = f"{other[0]} has shape {shapes}."
    do = "Choose the backbone that they were trained with."
    if not missing and other == [first]:
        do = "Set stack.n_slices and inner_windows as in the run that they are from."
    raise InputError(
        "The weights do not fit the backbone.",
        where=source,
        why=why,
        do=do,
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
        # torch.hub announces a download on stdout, which is for results.
        with redirect_stdout(sys.stderr):
            tensors = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise _not_downloaded(name, entry.url, error) from error
    preset = entry.transforms()
    source = f"torchvision {torchvision.__version__}, {entry}"
    return Pretrained(tensors, source, tuple(preset.mean), tuple(preset.std))


def _not_downloaded(name: str, place: str, error: Exception) -> InputError:
    return InputError(
        f"The weights of {name} could not be downloaded.",
        where=place,
        why=first_line(error),
        do="Connect to the network, fetch the file elsewhere and pass --weights FILE, "
        "or train without --weights.",
    )
