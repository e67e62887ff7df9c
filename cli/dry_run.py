"""What medvision train --dry-run prints: settings with their sources, data, network and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from medvision.cli.console import format_seconds

if TYPE_CHECKING:
    from medvision.training.cost import Cost
    from medvision.training.dry_run import DryRun, LesionSizes, PyramidLevel


def print_dry_run(found: DryRun) -> None:
    """Print all parts of a dry run but its last line, the summary."""
    print("Settings")
    names = max(len(item.name) for item in found.settings)
    values = [_short(item.value) for item in found.settings]
    width = max(len(value) for value in values)
    for item, value in zip(found.settings, values, strict=True):
        print(f"  {item.name:<{names}}  {value:<{width}}  {item.source}")
    _print_lines("Data", _data_lines(found))
    _print_lines("Network", _network_lines(found))
    _print_lines("Cost", _cost_lines(found.cost, found.device))


def _data_lines(found: DryRun) -> dict[str, str]:
    return {
        "scans": f"{found.training_scans} to train on, {found.validation_scans} held out, "
        f"{found.healthy_scans} of them healthy, {len(found.left_out)} left out",
        "lesions": _counts(found.lesions),
        "held out": _counts(found.held_out_lesions),
        "pixels": f"{found.pixel_mm:g} mm",
        "lesion size": _sizes(found.sizes),
    }


def _network_lines(found: DryRun) -> dict[str, str]:
    frozen = found.parameters - found.trained_parameters
    lines = {
        "parameters": f"{found.parameters:,}{f', {frozen:,} of them frozen' if frozen else ''}",
        "transfer": found.transfer,
        "strides": ", ".join(str(stride) for stride in found.strides) + " pixels",
    }
    for number, level in enumerate(found.levels, start=1):
        lines[f"level {number}"] = _level(level)
    return lines


def _level(level: PyramidLevel) -> str:
    anchors = ", ".join(f"{width:g} x {height:g}" for width, height in level.anchor_sizes) or "none"
    return (
        f"stride {level.stride}, sees {level.receptive_field} pixels "
        f"({level.receptive_field_mm:g} mm): {level.lesions_in_field:.0%} of lesions whole; "
        f"{level.lesions_under_a_cell:.0%} are smaller than a cell; anchors {anchors}"
    )


def _cost_lines(cost: Cost, device: str) -> dict[str, str]:
    return {
        "device": device,
        "a step": f"{cost.seconds_per_step:.2f} s",
        "a slice": f"{cost.seconds_per_slice:.3f} s in validation",
        "time": f"about {format_seconds(cost.seconds_in_all)} for {cost.steps_in_time} steps; "
        f"{format_seconds(cost.seconds_preparing)} of it to prepare the scans, "
        f"{format_seconds(cost.seconds_looking)} to validate and to find hard negatives",
        "memory": f"about {cost.memory_mib:.0f} MiB",
    }


def _sizes(sizes: LesionSizes) -> str:
    parts = zip(sizes.percentiles, sizes.pixels, sizes.mm, strict=True)
    listed = ", ".join(f"{percent} %: {pixels:g} ({mm:g} mm)" for percent, pixels, mm in parts)
    return f"{listed}; pixels, longer side"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _short(value: object) -> str:
    """Write a value as one could write it in YAML."""
    return json.dumps(value)


def _print_lines(title: str, lines: Mapping[str, str]) -> None:
    print(title)
    width = max(len(name) for name in lines)
    for name, text in lines.items():
        print(f"  {name:<{width}}  {text}")
