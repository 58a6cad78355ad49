"""Files are whole or absent, whatever fails while they are written."""

import errno
import os
from pathlib import Path

import pytest

from ffn.files import atomic


def test_a_written_file_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ("old", "newer é", b"\xff"):
        atomic.write_file(tmp_path / "f", content)
        expected = content.encode() if isinstance(content, str) else content
        assert (tmp_path / "f").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    atomic.write_file(tmp_path / "f", "old")
    monkeypatch.setattr(*((os, "fsync", full) if failing == "fsync" else (Path, "replace", full)))
    with pytest.raises(OSError, match="No space left"):
        atomic.write_file(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_removed_folder_is_gone_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    atomic.remove_folder(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert atomic.sha256_file(tmp_path / "f").startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.mark.skipif(os.name != "posix", reason="locks are those of POSIX")
def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    taken = pytest.raises(ValueError, match="another process is using this folder")
    with atomic.exclusive(tmp_path), taken, atomic.exclusive(tmp_path):
        pass
    with atomic.exclusive(tmp_path):
        pass
