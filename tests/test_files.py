"""Atomic writing: the old file or the new one, never half of one."""

import hashlib
import os
import stat

import pytest

from medvision.files import atomic_path, atomic_write_bytes, atomic_write_text, sha256_of


def test_bytes_and_text_are_written_and_leave_nothing_else(tmp_path):
    atomic_write_bytes(tmp_path / "a.bin", b"\x00\xff")
    atomic_write_text(tmp_path / "b.txt", "Größe 3 mm\n")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b.txt").read_bytes() == "Größe 3 mm\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.txt"]


def test_missing_folders_are_made(tmp_path):
    atomic_write_text(tmp_path / "new" / "deep" / "a.txt", "x")
    assert (tmp_path / "new" / "deep" / "a.txt").read_text() == "x"


def write_half_then_fail(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk full")


def test_a_failure_keeps_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_half_then_fail(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_appears_only_when_complete(tmp_path):
    path = tmp_path / "a.nii.gz"
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith(".nii.gz")
        assert not path.exists()
        temporary.write_bytes(b"done")
    assert path.read_bytes() == b"done"


def test_permissions_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_sha256(tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()
