"""Look at the machine and the installation: is everything here that medvision needs?

Nothing is believed because it can be imported: packages are asked for their version, every transfer
syntax is decoded from a small sample of known pixels, and a file is written, synced and read back.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from medvision._version import __version__
from medvision.diagnosis import Check, Diagnosis, Section
from medvision.files import atomic_write_bytes
from medvision.progress import Progress, ProgressCallback, ignore_progress

DISTRIBUTION = "medvision-toolkit"
LOW_MEMORY_BYTES = 4 << 30
LOW_DISK_BYTES = 2 << 30

_PROCESSOR_FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "AMX": ("amx_tile",),
}
_OPTIONAL_PACKAGES = {
    "pylibjpeg-libjpeg": "a second decoder for JPEG and JPEG-LS (licence GPL-3)",
    "python-gdcm": "a second decoder for JPEG and JPEG 2000",
    "timm": "backbones named timm/NAME",
    "onnx": "medvision export --format onnx",
    "onnxscript": "medvision export --format onnx",
    "onnxruntime": "medvision export --format onnx, medvision predict --engine onnx",
}


def diagnose(
    folder: Path, *, quick: bool = False, on_progress: ProgressCallback = ignore_progress
) -> Diagnosis:
    """Examine the machine, and ``folder`` as a place to write results to.

    ``quick`` leaves out what takes seconds: decoding and importing torch.
    """
    stages = {
        "Versions": check_packages,
        "Processor": check_processor,
        "Memory and disk": lambda: check_space(folder),
    }
    if not quick:
        # Imported late: decoding takes NumPy and the readers, which ``quick`` does without.
        from medvision.doctor_decoding import check_transfer_syntaxes

        stages["Transfer syntaxes decoded"] = check_transfer_syntaxes
        stages["Graphics processor"] = check_gpu
    sections = []
    for done, (title, examine) in enumerate(stages.items()):
        on_progress(Progress("doctor", done, len(stages), "sections", title))
        sections.append(Section(title, tuple(examine())))
    on_progress(Progress("doctor", len(stages), len(stages), "sections"))
    return Diagnosis(tuple(sections))


def check_packages() -> Iterable[Check]:
    """Give the version of medvision, of Python and of every package it needs or can use."""
    yield Check("medvision", "ok", __version__)
    system = f"{platform.system()} {platform.machine()}"
    yield Check("Python", "ok", f"{platform.python_version()} ({system})")
    for name in _required_packages():
        version = _version_of(name)
        yield Check(
            name,
            "ok" if version else "failed",
            version or "not installed",
            None if version else f'Install it: python -m pip install "{name}"',
        )
    for name, use in _OPTIONAL_PACKAGES.items():
        version = _version_of(name)
        detail = f"{version}, optional: {use}" if version else f"not installed, optional: {use}"
        yield Check(name, "ok" if version else "note", detail)


def check_processor() -> Iterable[Check]:
    """Give the processor's name, its usable cores and the instructions that speed up medvision."""
    model, flags = read_cpuinfo()
    yield Check("Processor", "ok", model or platform.machine())
    yield Check("Cores", "ok", f"{_usable_cores():g} usable of {os.cpu_count()}")
    for name, any_of in _PROCESSOR_FEATURES.items():
        there = bool(flags.intersection(any_of))
        yield Check(name, "ok" if there else "note", "yes" if there else "no")


def check_space(folder: Path) -> Iterable[Check]:
    """Give free memory and disk space, and write, sync and read back a file in ``folder``."""
    memory = _available_memory()
    if memory is not None:
        yield _enough("Free memory", memory, LOW_MEMORY_BYTES, "Close other programs.")
    shared = Path("/dev/shm")  # noqa: S108 - asked for its size only
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        yield Check("Free shared memory", "ok", f"{_gib(free)} in {shared}")
    for name, place in {
        "Output folder": folder,
        "Temporary folder": Path(tempfile.gettempdir()),
    }.items():
        yield from _check_folder(name, place)


def check_gpu() -> Iterable[Check]:
    """Give the graphics processor and its driver as torch sees them; this imports torch."""
    import torch

    driver = _nvidia_driver()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            detail = f"{properties.name}, {_gib(properties.total_memory)}"
            yield Check(f"cuda:{index}", "ok", f"{detail}, CUDA {torch.version.cuda}")
        yield Check("Driver", "ok", driver or "unknown version")
    elif driver:
        yield Check(
            "CUDA",
            "note",
            f"driver {driver} found, but torch {torch.__version__} cannot use it",
            "Update the driver, or install a torch that is built for it (pytorch.org).",
        )
    else:
        yield Check("CUDA", "note", "no graphics processor: medvision computes on the processor")


def _required_packages() -> list[str]:
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    needed = (text for text in requirements if "extra ==" not in text)
    return [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in needed]


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """Return the model name and the feature flags; empty where the system does not tell."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return "", set()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name", ""), set(flags.split())


def _usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Return the cores this process may use: its affinity, cut by the quota of a container."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def _available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of memory that can be had, cut by the limit of a container."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    except OSError:
        return None
    if not found:
        return None
    available = int(found[1]) << 10
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return max(0, min(available, limit - used))


def _check_folder(name: str, folder: Path) -> Iterable[Check]:
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(prefix=".medvision-doctor-", dir=folder) as scratch:
            probe = Path(scratch) / "probe.bin"
            sent = os.urandom(1 << 16)
            atomic_write_bytes(probe, sent)
            received = probe.read_bytes()
    except OSError as error:
        detail = f"{folder}: {error.strerror or error}"
        yield Check(
            name, "failed", detail, "Choose a folder that exists and that you may write to."
        )
        return
    if received != sent:
        yield Check(name, "failed", f"{folder}: a file came back changed", "Check that disk.")
        return
    checked = _enough(name, free, LOW_DISK_BYTES, "Free some disk space.")
    yield Check(name, checked.status, f"{folder}: writable, {checked.detail}", checked.remedy)


def _enough(name: str, free: int, low: int, remedy: str) -> Check:
    if free >= low:
        return Check(name, "ok", f"{_gib(free)} free")
    return Check(name, "note", f"{_gib(free)} free, below {_gib(low)}", remedy)


def _nvidia_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
