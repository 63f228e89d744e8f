"""Memory that comes, or is filled in, after a container's restore, on the host that it comes to."""

from __future__ import annotations

import json
import os
import select
from typing import Any

from migrate import command, places
from migrate.agent.target_layers import TargetLayers
from migrate.errors import ProtocolError

_DRAIN_S = 60.0  # for how long a move waits for memory that is being filled in


class TargetMemory(TargetLayers):
    _released = False
    _drain_fd: int | None = None  # where the runtime tells that all memory is there

    def drained(self) -> dict[str, Any]:
        """Wait until the container has all of the memory that was sent before, and say how that went; {} where it had it at once.

        "filling" says that it takes longer than one waits for, "failed" that it was killed for it, and why.
        """
        if not self._released:
            raise ProtocolError("the container was not released here")
        if self._drain_fd is None:
            return {}
        try:
            if not select.select([self._drain_fd], [], [], _DRAIN_S)[0]:
                return {"filling": True}
            if line := os.read(self._drain_fd, 1 << 16):
                told: dict[str, Any] = json.loads(line)
                return told
        finally:
            self._close_drain()
        failure = (command.state(self._container) or {}).get("annotations", {}).get("ferry.failure")
        return {"failed": failure} if failure else {}

    def _see_filled(self) -> None:
        """Stay until the container has the memory that comes after its restore, or never will: it comes by what is here."""
        if self._drain_fd is not None and (places.images(self._migration()) / places.LATER_PAGES).exists():
            select.select([self._drain_fd], [], [])
        self._close_drain()

    def _lacks_memory(self) -> bool:
        """Say whether memory that was to come after the restore has not come."""
        migration = self._migration()
        return (places.images(migration) / places.LATER_PAGES).exists() and not places.served(migration).exists()

    def _close_drain(self) -> None:
        if self._drain_fd is not None:
            os.close(self._drain_fd)
            self._drain_fd = None
