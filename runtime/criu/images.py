"""Image directories: who may read them, what they hold beside CRIU's files, and CRIU's statistics."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.criu.request import NOTES_FILE, SHARED_FILE, STDIO_FILE
from runtime.errors import KernelError, NotFound, SpecError
from runtime.spec.config import Spec

_STATS = (
    "freezing_time", "frozen_time", "memdump_time", "memwrite_time", "pages_scanned", "pages_skipped_parent", "pages_written",
    "pages_lazy",
    "forking_time", "restore_time", "pages_restored",
)  # fmt: skip
_MAX_PARENTS = 1000
_ACL = "system.posix_acl_access"
_READ, _WRITE, _SEARCH = 4, 2, 1
_STATS_MAGIC = struct.pack("<II", 0x55105940, 0x57093306)
# What stats.proto demands of a dump's entry.
_DUMP_FIELDS = (
    "freezing_time", "frozen_time", "memdump_time", "memwrite_time", "pages_scanned", "pages_skipped_parent", "pages_written",
    "pages_lazy", "page_pipes", "page_pipe_bufs", "shpages_scanned", "shpages_skipped_parent", "shpages_written",
)  # fmt: skip


def make(path: Path) -> None:
    """Make an image directory that only its owner can read: images hold the memory's secrets. Raises: KernelError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise KernelError(f"cannot make image directory {path}", e.errno or 0) from e


def clear(path: Path) -> None:
    """Remove the images of an earlier dump: of processes that are no more they would be taken for a part of the next.

    Raises: KernelError.
    """
    try:
        for entry in (*path.glob("*.img"), *path.glob("stats-*"), path / "parent", path / SHARED_FILE):
            if entry.is_symlink() or entry.is_file():
                entry.unlink()
    except OSError as e:
        raise KernelError(f"cannot clear image directory {path}", e.errno or 0) from e


def require(path: Path) -> None:
    """Refuse a directory that holds no checkpoint, or whose parents are not there. Raises: NotFound."""
    # CRIU's pre-dumps have an inventory, too, but no processes.
    for name in ("inventory.img", "pstree.img"):
        if not (path / name).is_file():
            raise NotFound(f"no checkpoint in {path}: it has no {name}", hint="give the directory with --image-path")
    for directory in chain(path):
        link = directory / "parent"
        if link.is_symlink() and not link.is_dir():
            raise NotFound(
                f"{link} leads to {os.readlink(link)}, which is not there", hint="bring that image directory there, too"
            )


def chain(path: Path) -> Iterator[Path]:
    """Return an image directory and its parents, as far as they are there. Raises: SpecError."""
    for _ in range(_MAX_PARENTS):
        if not path.is_dir():
            return
        yield path
        if not (path / "parent").is_symlink():
            return
        path = path / os.readlink(path / "parent")
    raise SpecError(f"the parents of {path} go round in a circle")


def require_parent(path: Path) -> None:
    """Refuse a directory that no dump was written into. Raises: NotFound."""
    # Of a pre-dump into a page server only the inventory is here.
    if not any(path.glob("pagemap-*.img")) and not (path / "inventory.img").is_file():
        raise NotFound(
            f"no dump or pre-dump in {path}: it has no pagemap-*.img", hint="give the one before this by --parent-path"
        )


def tracked(path: Path) -> bool:
    """Say whether a dump or pre-dump began the kernel's tracking of memory: CRIU can go on only from such a one.

    It tells when it was made, by which CRIU sees whether a process is the one that was dumped.
    """
    from pycriu.images import inventory_pb2

    try:
        return bool(_load(path / "inventory.img", 4, inventory_pb2.inventory_entry).HasField("dump_uptime"))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def readable_inside(path: Path, spec: Spec, *, writable: bool) -> Iterator[int]:
    """Open an image directory for CRIU; for a container with a user namespace so that its root, too, may read there.

    CRIU opens images in a process that is in the new user namespace already: before its mappings are written as the host's root,
    later as the user that the namespace's root is. An access control list is for both; it is taken away at the end.

    Raises: ContainerError.
    Source: acl(5); the kernel's posix_acl_xattr.h.
    """
    changed: list[tuple[Path, int]] = []
    root = _root_of(spec)
    try:
        if root is not None:
            for directory in chain(path):
                for entry in (directory, *directory.iterdir()):
                    if not entry.is_symlink():
                        _let_read(entry, root, writable, changed)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        _take_back(changed)
        hint = "put the images on a file system with access control lists" if e.errno == errno.ENOTSUP else None
        raise KernelError(f"cannot open image directory {path} for the container", e.errno or 0, hint=hint) from e
    try:
        yield fd
    finally:
        os.close(fd)
        _take_back(changed)


def _root_of(spec: Spec) -> int | None:
    """Return the host's user that is root in a user namespace of the container's own."""
    if spec.linux.namespace("user") is not None:
        for m in spec.linux.uid_mappings:
            if m.container_id == 0 and m.host_id != 0:
                return m.host_id
    return None


def _let_read(entry: Path, uid: int, writable: bool, changed: list[tuple[Path, int]]) -> None:
    mode = stat.S_IMODE(entry.stat().st_mode)
    more = _READ | (_WRITE if writable else 0) | (_SEARCH if entry.is_dir() else 0)
    none = 0xFFFFFFFF
    entries = (
        (1, mode >> 6 & 7, none),
        (2, more, uid),
        (4, mode >> 3 & 7, none),
        (0x10, more | mode >> 3 & 7, none),
        (0x20, mode & 7, none),
    )
    os.setxattr(entry, _ACL, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries))
    changed.append((entry, mode))


def _take_back(changed: list[tuple[Path, int]]) -> None:
    for entry, mode in changed:
        with contextlib.suppress(OSError):  # wiped meanwhile
            os.removexattr(entry, _ACL)
            entry.chmod(mode)


def wipe(path: Path) -> None:
    """Overwrite and remove an image directory, which holds the memory's secrets; what cannot be removed stays. Idempotent."""
    for entry in sorted(path.glob("*")):
        with contextlib.suppress(OSError):  # on a full disk some file systems have no place for what is overwritten
            if not entry.is_symlink() and entry.is_file():
                fd = os.open(entry, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    left = os.fstat(fd).st_size
                    while left > 0:
                        left -= os.write(fd, bytes(min(left, 1 << 20)))
                    os.fsync(fd)
                finally:
                    os.close(fd)
        with contextlib.suppress(OSError):
            entry.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def save_stdio(path: Path, names: tuple[str, ...]) -> None:
    """Keep what the container's descriptors 0-2 were, in the file that runc uses."""
    (path / STDIO_FILE).write_text(json.dumps(list(names)))


def load_stdio(path: Path) -> list[str]:
    """Return what `save_stdio` kept; an image directory without it has none. Raises: SpecError."""
    try:
        names = json.loads((path / STDIO_FILE).read_text())
    except FileNotFoundError:
        return []
    except ValueError as e:
        raise SpecError(f"{path / STDIO_FILE}: is not JSON: {e}") from e
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise SpecError(f"{path / STDIO_FILE}: is no list of names")
    return names[:3]


def save_notes(path: Path, notes: dict[str, Any]) -> None:
    """Keep what a restore by this runtime must know beside CRIU's images."""
    (path / NOTES_FILE).write_text(json.dumps(notes))


def load_notes(path: Path) -> dict[str, Any]:
    """Return what `save_notes` kept; images of another runtime have none."""
    try:
        notes = json.loads((path / NOTES_FILE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise SpecError(f"{path / NOTES_FILE}: is not JSON: {e}") from e
    return notes if isinstance(notes, dict) else {}


def stats(directory: Path, which: str) -> dict[str, int]:
    """Return CRIU's statistics of a `dump` or `restore`; empty when it wrote none.

    Units: times in microseconds.
    """
    try:
        entry = getattr(_load_stats(directory / f"stats-{which}"), which)
    except (OSError, ValueError):
        return {}
    return {field.name: int(value) for field, value in entry.ListFields() if field.name in _STATS}


def save_stats(directory: Path, found: dict[str, int]) -> None:
    """Write the statistics of a dump that CRIU had no part in, in its format. Raises: OSError."""
    from pycriu.images import stats_pb2

    dump = stats_pb2.dump_stats_entry(**{**dict.fromkeys(_DUMP_FIELDS, 0), **found})
    _write_stats(directory / "stats-dump", stats_pb2.stats_entry(dump=dump))


def update_stats(directory: Path, changes: dict[str, int]) -> None:
    """Change CRIU's statistics of a dump, if they are here. Raises: OSError, ValueError."""
    path = directory / "stats-dump"
    try:
        document = _load_stats(path)
    except FileNotFoundError:
        return
    for name, value in changes.items():
        setattr(document.dump, name, value)
    _write_stats(path, document)


def _load_stats(path: Path) -> Any:
    from pycriu.images import stats_pb2

    return _load(path, len(_STATS_MAGIC), stats_pb2.stats_entry)


def _load(path: Path, start: int, message: Any) -> Any:
    """Read an image of a single message: one or two magic numbers of `start` bytes, a length, the message.

    pycriu's own reader of images asks protobuf for what newer ones do not have, so the message is read without it.

    Raises: ValueError when it is damaged; OSError.
    """
    data = path.read_bytes()
    try:
        (length,) = struct.unpack_from("<I", data, start)
        return message.FromString(data[start + 4 : start + 4 + length])
    except Exception as e:
        raise ValueError(f"{path}: is damaged or cut short: {e}") from e


def _write_stats(path: Path, document: Any) -> None:
    raw = document.SerializeToString()
    path.write_bytes(_STATS_MAGIC + struct.pack("<I", len(raw)) + raw)
