"""Locks on a host: one for each container that is being moved, and a bounded number of moves at a time.

A lock is held by the kernel (flock) for the agent that took it, and for the `runtime` processes that hold the container, which
inherit it: nobody gets it before all of them are gone, whoever the coordinator was and wherever it ran. What the file says is
who that is, for people; a file that nobody holds is stale, whatever it says.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from migrate import places
from migrate.errors import Busy, Locked, MigrateError

MAX_MOVES = int(os.environ.get("FERRY_MAX_MOVES", "4"))
_AGAIN_S = 0.02


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Lock:
    """One lock that is held; `fd` is inherited by what must not outlive it."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self.fd = path, fd

    def release(self) -> None:
        """Give it back, and remove its file. Idempotent."""
        if self.fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self.fd)
            self.fd = -1


def _try(path: Path, owner: dict[str, Any]) -> Lock | None:
    """Take a lock, or return None when it is held. Raises: MigrateError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == os.stat(path).st_ino:
                    break
            os.close(fd)  # its holder removed it when it ended: that one guards nothing
        os.ftruncate(fd, 0)
        with contextlib.suppress(OSError):  # the text is for people; on a full tmpfs the lock holds all the same
            os.pwrite(fd, json.dumps(owner).encode(), 0)
    except OSError as e:
        raise MigrateError(f"cannot take the lock {path}: {e.strerror}") from e
    return Lock(path, fd)


def take(container: str, owner: dict[str, Any], timeout_s: float = 0) -> Lock:
    """Take a container's lock. Raises: Locked when somebody has it for that long; MigrateError."""
    deadline = time.monotonic() + timeout_s
    path = places.lock(container)
    while (lock := _try(path, owner)) is None:
        if time.monotonic() >= deadline:
            raise Locked(f"container {container} is being moved already{words(holder(container))}")
        time.sleep(_AGAIN_S)
    return lock


def take_slot(owner: dict[str, Any]) -> Lock:
    """Take one of the places for moves on this host. Raises: Busy, MigrateError."""
    for number in range(MAX_MOVES):
        if (lock := _try(places.slot(number), owner)) is not None:
            return lock
    raise Busy(
        f"this host takes part in {MAX_MOVES} moves already", hint="wait for one to end (migrate status), or set FERRY_MAX_MOVES"
    )


def sweep() -> None:
    """Remove the files of locks that nobody holds: whoever had them was killed. Never fails."""
    for directory in (places.lock("x").parent, places.slot(0).parent):
        for path in directory.glob("*"):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(fd).st_ino == os.stat(path).st_ino:
                        path.unlink()
                finally:
                    os.close(fd)


def owner(migration_id: str, coordinator: str) -> dict[str, Any]:
    """Return what a lock of ours says of us."""
    return {"migration": migration_id, "pid": os.getpid(), "boot_id": boot_id(), "coordinator": coordinator}


def holder(container: str) -> dict[str, Any] | None:
    """Return what the lock of a container says of the one that holds it; None when nobody does. Raises: ProtocolError."""
    try:
        fd = os.open(places.lock(container), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(OSError, ValueError):
            document = json.loads(os.pread(fd, 4096, 0))
            if isinstance(document, dict):
                return document
        return {}
    finally:
        os.close(fd)
    return None


def words(found: dict[str, Any] | None) -> str:
    """Say who holds a lock."""
    if not found:
        return ""
    return (
        f" by {found.get('migration', 'another move')}, whose coordinator is on {found.get('coordinator') or 'an unknown host'}"
    )
