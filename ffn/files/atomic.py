"""Files and folders that are whole or absent: written under another name, flushed to the disk, then renamed.

    with replacing(path) as partial:
        partial.write_text("new content")

A rename within one folder is atomic: a reader, or a process killed at any moment, finds the old content or
the new one, never a part of it. When the disk is full the OSError passes on and the old content stays.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file or folder written there replaces `path` unless the block raises.

    A folder replaces only a folder that is absent or empty.
    """
    with aside(path) as partial:
        yield partial
        publish(partial, path)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, where nothing exists, and delete it at the end.

    For several files that belong together: write them all, `flush` the folder, then `publish` each file.
    """
    partial = path.with_name(f".{path.name}.partial")
    _delete(partial)  # left by a killed process
    try:
        yield partial
    finally:
        _delete(partial)


def publish(partial: Path, path: Path) -> None:
    """Flush a written file or folder to the disk and rename it to `path`."""
    flush(partial)
    partial.replace(path)
    _sync(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to the disk."""
    for inside in path.rglob("*"):
        _sync(inside)
    _sync(path)


def write_file(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` by `content` (text as UTF-8)."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_folder(path: Path) -> None:
    """Delete a folder. It is renamed first, so that a half-deleted folder is never taken for a whole one."""
    doomed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    path.replace(doomed)
    shutil.rmtree(doomed)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder for this process until the block or the process ends.

    Raises:
        ValueError: another process holds the lock.
    """
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another process is using this folder") from None
        yield


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir():
        if os.name != "posix":  # elsewhere a folder cannot be opened
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)  # Windows flushes only what is open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
