"""Which verb may be used on a container of which status. Pure: one table, read by the code and by its test.

    creating --> created --> running <--> paused
                    |           |            |
                    +-----------+------------+--> stopped --> (deleted)

Source: OCI runtime specification 1.2, runtime.md, Lifecycle; the words of the errors are runc's.
"""

from __future__ import annotations

from enum import StrEnum

from runtime.errors import WrongStatus


class Status(StrEnum):
    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


_LIVE = frozenset({Status.CREATED, Status.RUNNING, Status.PAUSED})

ALLOWED: dict[str, frozenset[Status]] = {
    "start": frozenset({Status.CREATED}),
    "exec": frozenset({Status.CREATED, Status.RUNNING}),
    "kill": _LIVE,
    "pause": frozenset({Status.CREATED, Status.RUNNING}),
    "resume": frozenset({Status.PAUSED}),
    "ps": _LIVE | {Status.STOPPED},
    "update": _LIVE,
    "checkpoint": frozenset({Status.RUNNING}),
    "delete": frozenset({Status.STOPPED, Status.CREATING, Status.CREATED}),
    "delete --force": frozenset(Status),
}

_WORDS: dict[tuple[str, Status], str] = {
    ("start", Status.RUNNING): "cannot start an already running container",
    ("start", Status.STOPPED): "cannot start a container that has stopped",
    ("exec", Status.STOPPED): "cannot exec in a stopped container",
    ("exec", Status.PAUSED): "cannot exec in a paused container",
    ("kill", Status.STOPPED): "container not running",
    ("update", Status.STOPPED): "container not running",
    ("pause", Status.PAUSED): "container already paused",
    ("pause", Status.STOPPED): "container not running",
    ("resume", Status.RUNNING): "container not paused",
    ("checkpoint", Status.PAUSED): "cannot checkpoint a paused container",
}


def require(verb: str, container_id: str, status: Status) -> None:
    """Refuse a verb that the container's status does not allow. Raises: WrongStatus."""
    if status in ALLOWED[verb]:
        return
    words = _WORDS.get((verb, status), f"cannot {verb} a container that is {status}")
    hint = None
    if verb == "delete":
        words = f"cannot delete container {container_id} that is not stopped: {status}"
        hint = "kill it first, or use delete --force"
    elif verb in ("exec", "checkpoint") and status == Status.PAUSED:
        hint = "resume it first"
    raise WrongStatus(f"{words}: {container_id}" if verb != "delete" else words, hint=hint)


def derive(*, pid: int, alive: bool, waits_for_start: bool, frozen: bool, being_created: bool) -> Status:
    """Tell a container's status from what is seen of it; nothing of it is stored, so no crash can make it wrong."""
    if not pid or not alive:
        return Status.CREATING if being_created and not pid else Status.STOPPED
    if frozen:
        return Status.PAUSED
    return Status.CREATED if waits_for_start else Status.RUNNING
