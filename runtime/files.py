"""Atomic saves, locks on directories, and opens that never leave a container's root."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def save_json(path: Path, document: Any, mode: int = 0o600) -> None:
    """Replace `path` by `document` so that a crash leaves the old or the new text, never a part of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "w") as f:
            json.dump(document, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def owners_alone(path: str, flags: int) -> int:
    """Open a file, as `open` wants its opener; one that is made is its owner's alone."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


_held: set[int] = set()


def forget_locks() -> None:
    """Close the descriptors of locks that a fork inherited: as long as one is open, the lock is held."""
    close_all(list(_held))
    _held.clear()


@contextlib.contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a directory until the block ends; waits for whoever holds it.

    The lock is on the inode: when the directory was removed while we waited, the lock that we got guards nothing,
    and FileNotFoundError is raised as if it had never been there.

    Raises: FileNotFoundError.
    Source: flock(2).
    """
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            ours, now = os.fstat(fd), os.stat(path)
            if (ours.st_dev, ours.st_ino) == (now.st_dev, now.st_ino):
                break
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    _held.add(fd)
    try:
        yield
    finally:
        _held.discard(fd)
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, however many calls it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def close_all(fds: list[int]) -> None:
    """Close file descriptors; one that is closed already is no error."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
