"""Files that are whole or absent: written under another name, flushed to the disk, then renamed.

A rename within one folder is atomic, so a reader (or a process killed at any moment) meets the old content
or the new one, never a part of it. When the disk is full the `OSError` passes on and the old content stays.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` by `content` (text as UTF-8)."""
    data = content.encode() if isinstance(content, str) else content
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(path: Path) -> Path:
    """Where the file or folder `path` is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def sync_file(path: Path) -> None:
    """Flush a written file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def publish(temporary: Path, path: Path) -> None:
    """Give a written and flushed file, or folder of such files, its name, and make the name last."""
    if temporary.is_dir():
        _sync_folder(temporary)
    temporary.replace(path)
    _sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder; it loses its name first, so that half of it is never taken for the whole."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.replace(doomed)
    shutil.rmtree(doomed)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; ValueError where another does. A process that ends lets go."""
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another process is using this folder") from None
        yield


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename is as durable as it gets
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
