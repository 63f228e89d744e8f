"""The hold: a checkpoint or a restore that stays undecided until its controller says commit or abort.

    runtime checkpoint --hold             controller (on the control descriptor, one JSON object or word a line)
     | {"event": "ready"} ------------------>|  everything slow is done; nothing was touched yet
     | <------------------------------ "go"  |
     | {"event": "frozen"} ----------------->|  (checkpoint only) the container stands still
     | {"event": "held", "pid": ...} ------->|  CRIU waits for our answer to a notify
     | <----------------------------- "serve"|  (checkpoint whose memory follows, only) see follow.py
     | <---------------- "commit" | "abort"  |
     | {"event": "resumed"} ---------------->|  (restore only) the container runs
     | {"event": "done" | "aborted", ...} -->|  or {"event": "error", "error": {...}} at any time

EOF instead of a word: the controller is gone, and that is abort. But while the decision file says commit, or what was
damaged, a checkpoint neither kills nor thaws: it leaves the container frozen, since whether the other side runs is not known
here, and two copies are worse than a stopped one. No file, `undecided` and `revoked` are no decision; an empty file is damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from runtime.errors import ContainerError

_NO_DECISION = (b"undecided", b"revoked")
_IDLE_S = 0.2


class Decision(StrEnum):
    COMMIT = "commit"
    ABORT = "abort"
    LEAVE_FROZEN = "leave-frozen"


class Controller:
    """The two directions of the control descriptor. Raises: ContainerError for a word out of turn."""

    def __init__(self, read_fd: int, write_fd: int, decision_file: Path | None) -> None:
        self._read_fd, self._write_fd, self._decision_file = read_fd, write_fd, decision_file
        self._buffer = b""
        for fd in (read_fd, write_fd):
            os.set_inheritable(fd, False)

    def say(self, event: str, **fields: Any) -> None:
        """Report an event; a controller that is gone is found out when its word is awaited."""
        try:
            os.write(self._write_fd, json.dumps({"event": event, **fields}).encode() + b"\n")
        except OSError:
            self._buffer = b""

    def _word(self, on_idle: Callable[[], None] | None = None) -> str | None:
        while b"\n" not in self._buffer:
            while on_idle is not None and not select.select([self._read_fd], [], [], _IDLE_S)[0]:
                on_idle()
            try:
                data = os.read(self._read_fd, 4096)
            except OSError:
                return None
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode(errors="replace").strip()

    def wait_go(
        self,
        go: str = "go",
        *,
        before: Mapping[str, Callable[[str], None]] | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> bool:
        """Wait for `go`; False means that nothing is to be done.

        `before` has what is called for other words that may come before it, with what follows them on their line; `on_idle`
        is called now and then. Raises: ContainerError.
        """
        while (word := self._word(on_idle)) is not None:
            name, _, rest = word.partition(" ")
            if before is None or name not in before:
                break
            before[name](rest)
        if word not in (go, "abort", None):
            raise ContainerError(f"unexpected word {word!r} on the control descriptor", hint=f"{go} or abort was expected")
        return word == go

    def words(self, wait_s: float) -> list[str] | None:
        """Wait so long for words; return those that there are, None when nobody will say any more."""
        if b"\n" not in self._buffer and select.select([self._read_fd], [], [], wait_s)[0]:
            data = b""
            with contextlib.suppress(OSError):
                data = os.read(self._read_fd, 65536)
            if not data:
                return None
            self._buffer += data
        whole, newline, rest = self._buffer.rpartition(b"\n")
        if newline:
            self._buffer = rest
        return whole.decode(errors="replace").splitlines() if newline else []

    def unread(self, words: list[str]) -> None:
        """Put words back, to be read again."""
        self._buffer = "".join(f"{word}\n" for word in words).encode() + self._buffer

    def wait_decision(self, before: Mapping[str, Callable[[str], None]] | None = None) -> Decision:
        """Wait for the decision; `before` is as for `wait_go`. Raises: ContainerError."""
        while (word := self._word()) is not None:
            name, _, rest = word.partition(" ")
            if before is None or name not in before:
                break
            before[name](rest)
        if word in (None, Decision.ABORT) and self._decided_commit():
            return Decision.LEAVE_FROZEN  # who takes the decision back removes the file first
        if word is None:
            return Decision.ABORT
        if word not in (Decision.COMMIT, Decision.ABORT):
            raise ContainerError(f"unexpected word {word!r} on the control descriptor", hint="commit or abort was expected")
        return Decision(word)

    def _decided_commit(self) -> bool:
        if self._decision_file is None:
            return False
        try:
            return self._decision_file.read_bytes().strip() not in _NO_DECISION
        except FileNotFoundError:
            return False
        except OSError:
            return True
