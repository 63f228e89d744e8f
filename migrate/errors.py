"""The error tree of the coordinator, and the outcomes of a move with their exit codes."""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How a move ended. The exit codes are in EXIT_CODES, and documented in docs/move.md."""

    COMPLETED = "COMPLETED"  # it runs on the target
    REFUSED = "REFUSED"  # nothing was touched
    ROLLED_BACK = "ROLLED_BACK"  # it runs on the source, the target keeps nothing
    IN_DOUBT = "IN_DOUBT"  # decided, but what the target did is not known; the source stands still
    SPLIT_BRAIN = "SPLIT_BRAIN"  # two copies run


EXIT_CODES = {
    Outcome.COMPLETED: 0,
    Outcome.REFUSED: 3,
    Outcome.ROLLED_BACK: 4,
    Outcome.IN_DOUBT: 5,
    Outcome.SPLIT_BRAIN: 6,
}


class MigrateError(Exception):
    """Base of all errors that a user is meant to see.

    The message is lower case, names the thing and the path, then the cause; the hint says what to do.
    """

    exit_code = 1
    code = "error"
    hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if hint is not None:
            self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def as_dict(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, "code": self.code, "message": self.message, "hint": self.hint}


class HostUnreachable(MigrateError):
    """No connection to a host."""

    code = "host-unreachable"
    exit_code = 3


class HostKeyUnknown(MigrateError):
    """The host's key is not in known_hosts."""

    code = "host-key-unknown"
    exit_code = 3


class HostKeyChanged(MigrateError):
    """The host's key is not the one in known_hosts."""

    code = "host-key-changed"
    exit_code = 3


class AuthenticationFailed(MigrateError):
    """The host accepts none of our keys."""

    code = "authentication-failed"
    exit_code = 3


class HostUnfit(MigrateError):
    """The host has no Ferry, or one that speaks another protocol."""

    code = "host-unfit"
    exit_code = 3


class ConnectionLost(MigrateError):
    """The connection to an agent broke, or it did not answer in time."""

    code = "connection-lost"


class ProtocolError(MigrateError):
    """The other side sent what it may not send."""

    code = "protocol-error"


class RuntimeFailed(MigrateError):
    """The `runtime` command on a host failed."""

    code = "runtime-failed"


class NetworkFailed(MigrateError):
    """A container's network could not be looked at, made, or joined to its host's."""

    code = "network-failed"


class TransferFailed(MigrateError):
    """Files could not be read, sent, written, or are not what was sent."""

    code = "transfer-failed"


class Locked(MigrateError):
    """Another move has the container."""

    code = "locked"
    exit_code = 3


class Busy(MigrateError):
    """The host takes part in as many moves as it may."""

    code = "busy"
    exit_code = 3


class Unfinished(MigrateError):
    """An earlier move of the container is not over."""

    code = "unfinished"
    exit_code = 3


class UnknownMigration(MigrateError):
    """No record of a move with that id."""

    code = "unknown-migration"
    exit_code = 3


class Diverged(MigrateError):
    """Memory changes faster than it can be sent, and the container is not to stand still for as long as the rest would take."""

    code = "diverged"


class NotShared(MigrateError):
    """A directory that was said to be the same storage on both hosts is not."""

    code = "not-shared"


class MemoryLost(MigrateError):
    """The container ran on the target, and was killed there, since its memory could not be filled in."""

    code = "memory-lost"


class Stopped(MigrateError):
    """`migrate abort` was asked for on the source."""

    code = "stopped"


class Refused(MigrateError):
    """Preflight says no; nothing was touched."""

    code = "refused"
    exit_code = 3


_KINDS: dict[str, type[MigrateError]] = {
    c.__name__: c
    for c in (
        HostUnreachable, HostKeyUnknown, HostKeyChanged, AuthenticationFailed, HostUnfit, ConnectionLost, ProtocolError,
        RuntimeFailed, NetworkFailed, TransferFailed, Locked, Busy, Unfinished, UnknownMigration, MemoryLost, Stopped, Refused,
    )
}  # fmt: skip


def from_dict(fields: Any) -> MigrateError:
    """Rebuild an error that an agent sent; an unknown kind becomes a MigrateError."""
    if not isinstance(fields, dict):
        return MigrateError("unknown error")
    hint = fields.get("hint")
    kind = _KINDS.get(str(fields.get("kind")), MigrateError)
    return kind(printable(str(fields.get("message", "unknown error"))), hint=None if hint is None else printable(str(hint)))


def printable(text: str) -> str:
    """Return what another host said without what would make a terminal do something."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
