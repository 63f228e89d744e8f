"""The journal of a move: what was intended, and what came of it, one line each.

    a3f19c02 {"seq": 4, "time": "2026-01-31T12:00:00.123Z", "phase": "freeze", "mark": "intent"}

The first word is the CRC-32 of the rest of the line: a line that a crash cut short is told from a whole one. The
lines are for recovery and for people: `cat` reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from migrate import faults
from migrate.errors import MigrateError

KEEP = 100


class Journal:
    """Appends to one file. Raises (constructor): MigrateError when it cannot be made: then nothing is begun."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seq = 0
        try:
            directory.mkdir(mode=0o700, parents=True)
            self._fd = os.open(directory / "journal", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise MigrateError(f"cannot begin a journal in {directory}: {e.strerror}") from e

    def append(self, phase: str, mark: str, *, durable: bool = False, **fields: Any) -> None:
        """Write one entry; a durable one is on disk when this returns. Raises: MigrateError."""
        entry = {
            "seq": self._seq,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "phase": phase,
            "mark": mark,
        }
        text = json.dumps({**entry, **fields})
        faults.strike(f"{phase}.{mark}", "before")
        try:
            os.write(self._fd, f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
            if durable:
                os.fsync(self._fd)
        except OSError as e:
            raise MigrateError(f"cannot write the journal in {self.directory}: {e.strerror}") from e
        self._seq += 1
        faults.strike(f"{phase}.{mark}", "after")

    def report(self, document: dict[str, Any]) -> None:
        """Keep the report beside the journal, and the directories of the newest moves only. Raises: MigrateError."""
        try:
            self._report(document)
        except OSError as e:
            raise MigrateError(f"cannot write the report in {self.directory}: {e.strerror}") from e

    def _report(self, document: dict[str, Any]) -> None:
        (self.directory / "report.json").write_text(json.dumps(document, indent=2) + "\n")
        older = sorted((d for d in self.directory.parent.iterdir() if d.is_dir()), key=lambda d: d.stat().st_mtime)
        for directory in older[:-KEEP]:
            shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        os.close(self._fd)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the whole entries of a journal; the reading ends at the first line that is damaged. Raises: OSError."""
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        checksum, _, text = line.partition(" ")
        if f"{zlib.crc32(text.encode()):08x}" != checksum:
            break
        entries.append(json.loads(text))
    return entries
