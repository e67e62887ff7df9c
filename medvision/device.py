"""The one place that knows about processors: which device, which number type, how memory is kept."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from medvision.errors import UsageError

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 1 << 30
_AMPERE = 8
"""Compute capability from which NVIDIA GPUs multiply bfloat16 natively."""


@dataclass(frozen=True)
class Device:
    """A torch device and the number type that its convolutions are fastest in."""

    torch_device: torch.device
    compute_dtype: torch.dtype

    @property
    def name(self) -> str:
        """Short name for logs, such as ``cpu (bfloat16)``."""
        return f"{self.torch_device} ({str(self.compute_dtype).removeprefix('torch.')})"

    def autocast(self) -> AbstractContextManager[None]:
        """Run the convolutions inside in ``compute_dtype``; a plain context if that is float32."""
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self.torch_device.type, self.compute_dtype, enabled=enabled)


def choose_device(name: str = "auto", precision: str = "auto") -> Device:
    """Return the device called ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``precision`` is ``auto`` (bfloat16 where the processor has instructions for it), ``float32`` or
    ``bfloat16``. Raises UsageError for a device that is not there.
    """
    torch_device = _torch_device(name)
    if torch_device.type == "cpu":
        _keep_freed_memory()
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if precision == "auto":
        return Device(torch_device, _fastest_dtype(torch_device))
    if precision not in dtypes:
        raise UsageError(f"Precision must be auto, float32 or bfloat16; got {precision!r}.")
    return Device(torch_device, dtypes[precision])


def _torch_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"Device must be auto, cpu, cuda, cuda:N or mps; got {name!r}.", why=str(error)
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"Device must be auto, cpu, cuda, cuda:N or mps; got {name!r}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(
            "Device 'mps' is not there: torch finds no Apple GPU.", do="Use --device cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"Device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices.",
            do="Use --device cpu, or run medvision doctor to see what torch finds.",
        )
    return device


def _fastest_dtype(device: torch.device) -> torch.dtype:
    # Without instructions of its own for bfloat16 a processor emulates it, slower than float32.
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= _AMPERE
        return torch.bfloat16 if native else torch.float32
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 natively (AVX512_BF16 or AMX)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
            flags = next((line for line in stream if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed activations instead of giving them back at each step.

    Given back and faulted in again, they cost a training step a fifth of its time and more.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
    except (OSError, AttributeError):
        return
