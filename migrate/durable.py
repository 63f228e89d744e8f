"""A word in a file that survives a crash of its host: the decision of a move on the source, its release on the target.

The file is made whole and flushed while nothing depends on it yet. Another word is then written over the first one, in place: it
takes no new space, no new name and one flush, and a disk writes a part of one sector or nothing of it.
"""

from __future__ import annotations

import os
from pathlib import Path

UNDECIDED = "undecided"
COMMIT = "commit"
REVOKED = "revoked"
RELEASED = "released"
RAN = "ran"
_WIDTH = 64
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC


def create(path: Path, word: str) -> None:
    """Make the file, on disk with its name when this returns. Raises: OSError; FileExistsError when it is there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
    try:
        _put(fd, word)
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(path.parent)


def write(path: Path, word: str, *, sync: bool = True) -> None:
    """Write another word; with `sync` it is on disk when this returns. Idempotent.

    Raises: OSError; what is on disk is then not known.
    """
    fd = os.open(path, os.O_WRONLY | _FLAGS)
    try:
        _put(fd, word)
        if sync:
            os.fdatasync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> str | None:
    """Return the word, None where there is no file. Raises: OSError."""
    try:
        return path.read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def sync_directory(path: Path) -> None:
    """Have a directory's names on disk. Raises: OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _put(fd: int, word: str) -> None:
    data = word.ljust(_WIDTH - 1).encode() + b"\n"
    if os.pwrite(fd, data, 0) != len(data):
        raise OSError(5, "short write")
