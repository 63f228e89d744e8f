"""Where things are on a host. Pure.

/run/ferry/migrate/ID/        of a move under way, on both hosts: 0700, on tmpfs, gone at its end
    images/                   the checkpoint
    decision                  on the source, from the moment of the decision
    owner                     which process holds the move
/run/ferry/migrate/locks/     one file for each container that is being moved
/var/lib/ferry/migrations/ID/ on the source: the journal and the report, kept
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from migrate.errors import ProtocolError

RUN = Path(os.environ.get("FERRY_RUN_DIR", "/run/ferry/migrate"))
HISTORY = Path(os.environ.get("FERRY_HISTORY_DIR", "/var/lib/ferry/migrations"))

_ID = re.compile(r"[0-9a-z-]{8,64}")


def working(migration_id: str) -> Path:
    """Return the directory of a move under way. Raises: ProtocolError for what is no id."""
    if not _ID.fullmatch(migration_id):
        raise ProtocolError(f"{migration_id!r} is no migration id")
    return RUN / migration_id


def images(migration_id: str) -> Path:
    return working(migration_id) / "images"


def decision(migration_id: str) -> Path:
    return working(migration_id) / "decision"


def lock(container: str) -> Path:
    return RUN / "locks" / container


def history(migration_id: str) -> Path:
    working(migration_id)
    return HISTORY / migration_id
