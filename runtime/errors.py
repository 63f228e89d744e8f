"""The error tree of the runtime: every class carries its exit code and, where there is one, a hint."""

from __future__ import annotations

import os
from typing import Any


class ContainerError(Exception):
    """Base of all errors that a user of the runtime is meant to see.

    The message is lower case, names the thing and the path, then the cause; the hint says what to do.
    """

    exit_code = 1
    hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if hint is not None:
            self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that `--log-format json` prints and that cross a child's pipe."""
        return {"kind": type(self).__name__, "message": self.message, "hint": self.hint, "exit_code": self.exit_code}


class SpecError(ContainerError):
    """A document is wrong: config.json, state.json, or an option's value."""


class Unsupported(ContainerError):
    """The document asks for something that this runtime or this kernel does not have."""


class UsageError(ContainerError):
    """The verb cannot be carried out as it was called."""


class NotFound(ContainerError):
    """The container does not exist."""


class AlreadyExists(ContainerError):
    """A container of that name exists."""


class WrongStatus(ContainerError):
    """The container is not in a status that the verb allows."""


class KernelError(ContainerError):
    """A system call failed; keeps its errno."""

    def __init__(self, message: str, errno_: int, *, hint: str | None = None) -> None:
        super().__init__(f"{message}: {os.strerror(errno_)}", hint=hint)
        self.errno = errno_


class CommandNotFound(ContainerError):
    """The process's executable is not there."""

    exit_code = 127


class CommandNotExecutable(ContainerError):
    """The process's executable is there, but cannot be executed."""

    exit_code = 126


class HookFailed(ContainerError):
    """A hook exited with an error or took longer than its timeout."""


class CriuError(ContainerError):
    """CRIU refused or failed; keeps the lines of its log that say why."""

    def __init__(self, message: str, *, log_lines: tuple[str, ...] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.log_lines = log_lines

    def __str__(self) -> str:
        return "\n  ".join((super().__str__(), *self.log_lines))

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "log_lines": list(self.log_lines)}


class CriuMissing(CriuError):
    """No CRIU is there, or it is too old for what was asked."""


class HoldAborted(ContainerError):
    """A held checkpoint or restore was told to let go, or its controller went away."""

    exit_code = 3


_KINDS: dict[str, type[ContainerError]] = {
    c.__name__: c
    for c in (
        SpecError, Unsupported, UsageError, NotFound, AlreadyExists, WrongStatus, CommandNotFound,
        CommandNotExecutable, HookFailed, HoldAborted,
    )
}  # fmt: skip


def from_dict(fields: dict[str, Any]) -> ContainerError:
    """Rebuild an error that crossed a pipe as `as_dict`; an unknown kind becomes a ContainerError."""
    message, hint = str(fields.get("message", "unknown error")), fields.get("hint")
    if str(fields.get("kind", "")).startswith("Criu"):
        return CriuError(message, log_lines=tuple(fields.get("log_lines", ())), hint=hint)
    error = _KINDS.get(str(fields.get("kind")), ContainerError)(message, hint=hint)
    error.exit_code = int(fields.get("exit_code", 1))
    return error
