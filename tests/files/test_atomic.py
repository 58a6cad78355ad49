"""Files are whole or absent, whatever fails while they are written."""

import errno
import os
from pathlib import Path

import pytest

from ffn.files import atomic


def test_write_file_replaces_the_old_file(tmp_path: Path) -> None:
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


def write_half(folder: Path) -> None:
    with atomic.replacing(folder) as partial:
        partial.mkdir()
        (partial / "a").write_text("half")
        raise OSError("the disk is full")


def test_a_folder_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    left = tmp_path / ".run.partial"  # by a killed process
    left.mkdir()
    (left / "old").write_text("")
    with pytest.raises(OSError, match="full"):
        write_half(tmp_path / "run")
    assert not list(tmp_path.iterdir())
    with atomic.replacing(tmp_path / "run") as partial:
        partial.mkdir()
        (partial / "a").write_text("whole")
        assert not (tmp_path / "run").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["run", "run/a"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the names of open files from /proc")
def test_everything_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fsync(descriptor: int, real=os.fsync) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    def replace(self: Path, target: Path, real=Path.replace) -> Path:
        done.append("renamed")
        return real(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with atomic.replacing(tmp_path / "run") as partial:
        (partial / "sub").mkdir(parents=True)
        (partial / "sub" / "a").write_text("x")
    assert set(done[:3]) == {".run.partial", "sub", "a"}
    assert done[3:] == ["renamed", tmp_path.name]


def test_remove_folder(tmp_path: Path) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    atomic.remove_folder(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert atomic.sha256_file(tmp_path / "f").startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.mark.skipif(os.name != "posix", reason="locks are those of POSIX")
def test_exclusive_is_held_once(tmp_path: Path) -> None:
    taken = pytest.raises(ValueError, match="another process is using this folder")
    with atomic.exclusive(tmp_path), taken, atomic.exclusive(tmp_path):
        pass
    with atomic.exclusive(tmp_path):
        pass
