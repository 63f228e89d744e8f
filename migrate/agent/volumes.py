"""What a source does to directories: those that move along are removed in the end, shared ones are shown to be the same."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from migrate import mounts, probe
from migrate.errors import MigrateError, ProtocolError, TransferFailed


def checked(plan: dict[str, Any], bundle: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what moves along, and what is shared: directories that are mounted into the container.

    Raises: ProtocolError for others, MigrateError.
    """
    volumes, shared = (tuple(map(str, plan.get(key) or ())) for key in ("volumes", "shared"))
    if others := {*volumes, *shared} - (probe.bind_sources(bundle) if volumes or shared else set()):
        raise ProtocolError(f"{', '.join(sorted(others))} is not mounted into the container")
    return volumes, shared


def remove(path: str, inode: int | None, migration_id: str) -> None:
    """Remove a directory that has moved, not one that somebody made there since. Idempotent. Raises: MigrateError, OSError."""
    # Renamed first, so that a half-deleted one is never taken for a whole one.
    gone = f"{path}.{migration_id}"
    if os.path.lexists(path) and os.lstat(path).st_ino == inode and not os.path.lexists(gone):
        if inside := mounts.below(Path(path)):
            raise TransferFailed(f"{path} is kept: {inside[0]} is mounted in it", hint="unmount it, then remove it by hand")
        os.rename(path, gone)
    if os.path.lexists(gone):
        shutil.rmtree(gone, ignore_errors=True)
        if os.path.lexists(gone):
            raise TransferFailed(f"cannot remove {gone}", hint="remove it by hand")


class Stamps:
    """Times of modification that are other ones for a moment: another host sees them where the storage is the same."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[int, int]] = {}  # when it was modified, in ns, and what was made of it, in s

    def make(self, path: str, mtime_s: int) -> None:
        """Set when a directory was modified. Idempotent. Raises: MigrateError."""
        try:
            before = os.stat(path)
            self._made.setdefault(path, (before.st_mtime_ns, mtime_s))
            os.utime(path, ns=(before.st_atime_ns, mtime_s * 1_000_000_000))
        except OSError as e:
            raise MigrateError(f"it cannot be seen whether {path} is shared: {e.strerror}") from e

    def undo(self, path: str) -> None:
        """Put back when it was modified, unless it was modified since. Idempotent."""
        before_ns, stamp_s = self._made.pop(path, (0, 0))
        with contextlib.suppress(OSError):
            now = os.stat(path)
            if stamp_s and int(now.st_mtime) == stamp_s:
                os.utime(path, ns=(now.st_atime_ns, before_ns))

    def undo_all(self) -> None:
        for path in list(self._made):
            self.undo(path)
