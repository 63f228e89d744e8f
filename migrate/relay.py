"""A data connection through the coordinator, for hosts that do not reach each other.

    agent on the source --socket-- second agent there ==== coordinator's pipes ==== second agent on the target

The two second agents are processes of ours, or `ssh` commands that lead to them; each one's output is the other one's input. No
byte of it passes through this process.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

from migrate import host
from migrate.errors import ConnectionLost
from migrate.session import Place
from migrate.transport.local import ProcessStream
from migrate.wire import Wire, ask, greet


class Relay:
    """Raises (constructor): MigrateError; nothing is left running then."""

    def __init__(self, source: Place, target: Place, remote_command: str, migration_id: str) -> None:
        self._near = ProcessStream(_agent(source, remote_command), f"the data connection to {source.name}")
        try:
            wire = Wire(self._near)
            greet(wire, source.name, self._near.noise)
            ask(wire, 1, "relay", {"migration_id": migration_id}, source.name)
            read_fd, write_fd = self._near.fds
            try:
                self._far = subprocess.Popen(
                    _agent(target, remote_command),
                    stdin=read_fd,
                    stdout=write_fd,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as e:
                raise ConnectionLost(f"cannot start {e.filename}: {e.strerror}") from e
            # Held by the two of them alone: the end of one is the end of the other.
            self._near.forsake()
        except BaseException:
            self._near.close()
            raise

    def close(self) -> None:
        """See both end, which they do when the agents do. Idempotent."""
        for process in (self._near.process, self._far):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)


def _agent(place: Place, remote_command: str) -> list[str]:
    if place.host is None:
        return [sys.executable, "-m", "migrate.agent"]
    return host.bulk_command(place.host.address(seen_from_here=True), f"{remote_command} agent")
