"""The wheel: built, installed outside the checkout, and run from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from medvision import __version__

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.wheel, pytest.mark.slow]


def run(*words: str | Path, cwd: Path) -> str:
    """Run a command away from the checkout, with nothing of this session's Python settings."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(word) for word in words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy of the tracked and new files: build leftovers must not reach the wheel."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if listed.returncode:
        pytest.skip("the wheel is built from a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment that borrows the dependencies of this one.

    A .pth file lends them, so that torch is not downloaded again. The checkout's editable install
    works through .pth files too, and Python reads those of its own site-packages only.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install"),
        *("--quiet", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def test_the_command_runs_from_the_wheel(installed: Path) -> None:
    command = installed / "bin" / "medvision"
    assert run(command, "--version", cwd=installed) == f"medvision {__version__}\n"
    assert "Usage: medvision" in run(command, "--help", cwd=installed)
    python = installed / "bin" / "python"
    printed = run(python, "-m", "medvision", "--version", cwd=installed)
    assert printed == f"medvision {__version__}\n"


def test_every_module_of_the_checkout_is_in_the_wheel(installed: Path) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "medvision").rglob("*.py")
        if path.name != "__main__.py"
    ]
    modules += [f"medvision.cli.{path.stem}" for path in (ROOT / "cli").glob("[a-z]*.py")]
    code = (
        "import importlib.util, json, sys\n"
        "specs = {name: importlib.util.find_spec(name) for name in json.load(sys.stdin)}\n"
        "print(json.dumps({name: spec and spec.origin for name, spec in specs.items()}))\n"
    )
    python = installed / "bin" / "python"
    done = subprocess.run(
        [python, "-c", code],
        input=json.dumps(modules),
        capture_output=True,
        text=True,
        cwd=installed,
        check=True,
    )
    for name, origin in json.loads(done.stdout).items():
        assert origin is not None, f"{name} is not in the wheel"
        assert Path(origin).is_relative_to(installed), f"{name} comes from {origin}"


def test_data_files_are_in_the_wheel(installed: Path) -> None:
    (site,) = installed.glob("lib/python*/site-packages")
    for folder, target in (("medvision", "medvision"), ("sample_data", "medvision/sample_data")):
        for path in (ROOT / folder).rglob("*"):
            if not path.is_file() or path.suffix in (".py", ".pyc"):
                continue
            packed = site / target / path.relative_to(ROOT / folder)
            assert packed.is_file(), f"{path.relative_to(ROOT)} is not in the wheel"
            assert packed.read_bytes() == path.read_bytes()


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    import zipfile

    assert wheel.name == f"medvision_toolkit-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    assert "License-Expression: Apache-2.0" in text or "License: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text


def test_doctor_finds_the_installed_packages(installed: Path) -> None:
    output = run(installed / "bin" / "medvision", "doctor", "--quick", "--json", cwd=installed)
    assert json.loads(output)["ok"] is True
