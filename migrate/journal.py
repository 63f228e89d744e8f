"""The journal of a move, on its source: what was intended, and what came of it, one line each.

    a3f19c02 {"seq": 4, "time": "2026-01-31T12:00:00.123Z", "phase": "freeze", "mark": "intent"}

The first word is the CRC-32 of the rest of the line: a line that a crash cut short is told from a whole one. The lines are for
recovery and for people: `cat` reads them. It is only appended to. Whether the move was decided on is not here, but in the word
beside it (migrate/durable.py), which takes no space.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from migrate import durable
from migrate.errors import MigrateError

MAX_LINE_BYTES = 1 << 20


class Journal:
    """Appends to the journal in a directory that is there. Raises (constructor): MigrateError."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "journal"
        try:
            known, damaged = read(path) if path.exists() else ([], 0)
            self._seq = max((e["seq"] for e in known), default=-1) + 1 + damaged
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                os.write(self._fd, b"\n")  # the line that a crash cut short ends here
            durable.sync_directory(directory)
        except OSError as e:
            raise MigrateError(f"cannot open the journal in {directory}: {e.strerror}") from e

    def append(self, phase: str, mark: str, *, sync: bool = False, **fields: Any) -> None:
        """Write one entry; with `sync` it is on disk when this returns. Raises: MigrateError."""
        entry = {
            "seq": self._seq,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "phase": phase,
            "mark": mark,
        }
        text = json.dumps({**entry, **fields})
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        if len(line) > MAX_LINE_BYTES:
            raise MigrateError(f"an entry of {len(line)} bytes is too long for the journal in {self.directory}")
        before = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) != len(line):
                raise OSError(28, os.strerror(28))
            if sync:
                os.fsync(self._fd)
        except OSError as e:
            with contextlib.suppress(OSError):  # half a line tells nobody anything
                os.ftruncate(self._fd, before)
            raise MigrateError(f"cannot write the journal in {self.directory}: {e.strerror}", hint="is its disk full?") from e
        self._seq += 1

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the whole entries of a journal, and how many lines are damaged. Raises: OSError."""
    entries: list[dict[str, Any]] = []
    damaged = 0
    for line in path.read_bytes().split(b"\n"):
        if not line:
            continue
        checksum, _, text = line.partition(b" ")
        if f"{zlib.crc32(text):08x}".encode() != checksum:
            damaged += 1
            continue
        try:
            entry = json.loads(text)
            entries.append({**entry, "seq": int(entry["seq"]), "phase": str(entry["phase"]), "mark": str(entry["mark"])})
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
    return entries, damaged
