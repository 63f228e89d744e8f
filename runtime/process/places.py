"""Places to mount on, made inside a root that may hold hostile links: all opens stay beneath the root's descriptor."""

from __future__ import annotations

import contextlib
import os
import posixpath

from runtime.linux.mount import openat2


def parent(root_fd: int, path: str) -> int:
    """Make the directories above `path` inside the root and return the last one's descriptor. Raises: OSError."""
    fd = os.dup(root_fd)
    walked = ""
    for part in [p for p in posixpath.dirname(path).split("/") if p]:
        walked += "/" + part
        os.close(fd)
        fd = _directory(root_fd, walked)
    return fd


def _directory(root_fd: int, path: str) -> int:
    flags = os.O_PATH | os.O_DIRECTORY
    try:
        return openat2(root_fd, path, flags)
    except FileNotFoundError:
        above = openat2(root_fd, posixpath.dirname(path), flags)
        try:
            os.mkdir(posixpath.basename(path), 0o755, dir_fd=above)
        finally:
            os.close(above)
        return openat2(root_fd, path, flags)


def ensure(root_fd: int, path: str, directory: bool) -> None:
    """Make the place that something is mounted on, unless it is there. Raises: OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.close(openat2(root_fd, path, os.O_PATH))
        return
    above = parent(root_fd, path)
    try:
        name = posixpath.basename(path)
        if directory:
            os.mkdir(name, 0o755, dir_fd=above)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=above))
    finally:
        os.close(above)
