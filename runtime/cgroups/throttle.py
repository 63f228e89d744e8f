"""Slow a container's processes down for a while, and have them back at their own speed whatever happens.

What the limit was is noted in a file before it is changed: when the process that slows the container down is killed, the next
one that has to do with the container's limits puts it back.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from runtime.cgroups.manager import Manager
from runtime.errors import ContainerError

# The kernel takes no quota below this.
_LEAST_QUOTA_US = 1000
_LEAST_CPUS = 0.01


class Throttle:
    """Limits the CPU time of a container to parts of what it took since this was made. `note` is the file."""

    def __init__(self, manager: Manager, note: Path) -> None:
        self._manager, self._note = manager, note
        self._began = time.monotonic()
        self._used_ns: int | None = None
        with contextlib.suppress(ContainerError):  # `to` says so, when it is asked for
            self._used_ns = manager.cpu_used_ns()
        self._cpus: float | None = None

    def to(self, percent: int) -> float:
        """Limit the container to so many percent of what it took; return to how many processors' time.

        Raises: ContainerError.
        """
        if self._cpus is None:
            used_ns = self._manager.cpu_used_ns() - (self._used_ns or 0)
            self._cpus = max(used_ns / max((time.monotonic() - self._began) * 1e9, 1.0), _LEAST_CPUS)
        now_us, period_us = self._manager.cpu_quota()
        was_us, ours = _read(self._note) or (now_us, [])
        if now_us not in ours:
            was_us, ours = now_us, []  # somebody else has set it meanwhile
        quota_us = max(int(self._cpus * period_us * percent / 100), _LEAST_QUOTA_US)
        if 0 <= was_us <= quota_us:
            self.lift()
            return was_us / period_us
        # Both are ours until the new one is set.
        _write(self._note, was_us, [*ours[-1:], quota_us])
        self._manager.set_cpu_quota(quota_us)
        return quota_us / period_us

    def lift(self) -> None:
        """Give the container what it had. Idempotent. Raises: ContainerError."""
        heal(self._manager, self._note)


def heal(manager: Manager, note: Path) -> None:
    """Undo what a throttle has left; what somebody else has set meanwhile stays. Idempotent. Raises: ContainerError."""
    found = _read(note)
    if found is None:
        return
    was_us, ours = found
    if manager.cpu_quota()[0] in ours:
        manager.set_cpu_quota(was_us)
    note.unlink(missing_ok=True)


def _read(note: Path) -> tuple[int, list[int]] | None:
    try:
        document = json.loads(note.read_text())
        return int(document["was"]), [int(q) for q in document["ours"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ContainerError(
            f"{note} cannot be read: {e}", hint="remove it, then set the limit: runtime update --cpu-quota"
        ) from e


def _write(note: Path, was_us: int, ours: list[int]) -> None:
    new = note.with_name(note.name + ".new")
    try:
        new.write_text(json.dumps({"was": was_us, "ours": ours}))
        new.rename(note)
    except OSError as e:
        raise ContainerError(f"cannot write {note}: {e.strerror}") from e
