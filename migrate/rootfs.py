"""Look at a directory tree without ever following a link of it.

Every name is opened below the descriptor of its directory with O_NOFOLLOW, one component at a time: a container
owns what is in its rootfs, and may swap a directory for a link at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from migrate.errors import ProtocolError, TransferFailed
from migrate.manifest import Item, Manifest

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


# Called with each directory, open, and its path, before what is in it is looked at.
OnDirectory = Callable[[int, bytes], None]


def scan(root: Path, on_directory: OnDirectory = lambda fd, path: None, leave_out: frozenset[bytes] = frozenset()) -> Manifest:
    """Look at a whole tree but for what is `leave_out`; entries that vanish meanwhile are left out, too.

    Raises: TransferFailed when the root cannot be read.
    """
    manifest: Manifest = {}
    with _opened_root(root) as fd:
        on_directory(fd, b".")
        manifest[b"."] = _item(b".", os.fstat(fd))
        _scan(fd, b"", os.fstat(fd).st_dev, manifest, on_directory, leave_out)
    return manifest


def look_at(
    root: Path,
    path: bytes,
    below: bool,
    on_directory: OnDirectory = lambda fd, path: None,
    leave_out: frozenset[bytes] = frozenset(),
) -> Manifest:
    """Look at one entry of a tree, and with `below` at all that is below it; empty when it is not there.

    Raises: TransferFailed when it cannot be read.
    """
    manifest: Manifest = {}
    with _opened_root(root) as fd:
        st = os.fstat(fd)
        if path == b".":
            return {path: _item(path, st)}
        try:
            with opened_parent(fd, path) as (parent, name):
                # What is mounted over a directory on the way is not in the tree.
                if os.fstat(parent).st_dev == st.st_dev:
                    _look(parent, name, path, st.st_dev, manifest, on_directory if below else None, leave_out)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as e:
            if e.errno != errno.ELOOP:
                raise TransferFailed(f"cannot read {os.fsdecode(path)}: {e.strerror}") from e
    return manifest


@contextlib.contextmanager
def _opened_root(root: Path) -> Iterator[int]:
    """Raises: TransferFailed when it cannot be opened."""
    try:
        fd = os.open(root, DIRECTORY)
    except OSError as e:
        raise TransferFailed(f"cannot read {root}: {e.strerror}") from e
    try:
        yield fd
    finally:
        os.close(fd)


def _item(path: bytes, st: os.stat_result) -> Item:
    size = st.st_size if stat.S_ISREG(st.st_mode) else 0
    return Item(
        path, st.st_mode, st.st_uid, st.st_gid, size, st.st_rdev, st.st_mtime_ns, st.st_ctime_ns,
        (st.st_dev, st.st_ino), st.st_nlink, time.time_ns(),
    )  # fmt: skip


def _scan(
    fd: int, prefix: bytes, device: int, manifest: Manifest, on_directory: OnDirectory, leave_out: frozenset[bytes]
) -> None:
    with os.scandir(fd) as entries:
        names = sorted(os.fsencode(e.name) for e in entries)
    for name in names:
        path = prefix + name
        try:
            _look(fd, name, path, device, manifest, on_directory, leave_out)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            raise TransferFailed(f"cannot read {os.fsdecode(path)}: {e.strerror}") from e


def _look(
    parent: int,
    name: bytes,
    path: bytes,
    device: int,
    manifest: Manifest,
    on_directory: OnDirectory | None,
    leave_out: frozenset[bytes],
) -> None:
    """Add an entry, and with `on_directory` what is below it. Raises: OSError."""
    if path in leave_out:
        return
    st = os.stat(name, dir_fd=parent, follow_symlinks=False)
    # Of a mount point the directory goes, but not what is mounted there.
    if on_directory is None or not stat.S_ISDIR(st.st_mode) or st.st_dev != device:
        manifest[path] = _item(path, st)
        return
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        on_directory(fd, path)
        manifest[path] = _item(path, os.fstat(fd))
        _scan(fd, path + b"/", device, manifest, on_directory, leave_out)
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened_parent(root_fd: int, path: bytes) -> Iterator[tuple[int, bytes]]:
    """Open the directory that holds `path`; give its descriptor and the last component. Raises: ProtocolError, OSError."""
    parts = path.split(b"/")
    if any(p in (b"", b".", b"..") for p in parts):
        raise ProtocolError(f"the other side sent a path that is none: {os.fsdecode(path)!r}")
    fd = os.dup(root_fd)
    try:
        for part in parts[:-1]:
            below = os.open(part, DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd, parts[-1]
    finally:
        os.close(fd)


def open_regular(name: bytes, parent: int, flags: int = os.O_RDONLY) -> int | None:
    """Open a file; None when it is no regular file. Raises: OSError."""
    # To open a device does something already: what this is, is looked at before.
    path_fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if not stat.S_ISREG(os.fstat(path_fd).st_mode):
            return None
        return os.open(f"/proc/self/fd/{path_fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(path_fd)
