"""Where things are on a host. Pure.

/run/ferry/migrate/ID/        of a move under way, on both hosts: 0700, on tmpfs, gone at its end
    images/                   the checkpoint
    data                      on the source: socket of a data connection that goes through the coordinator
    requests                  on the target: FIFO by which memory is asked for that comes after the restore
    served                    on the target: all of that memory is there
    lanes                     on the target: socket for further data connections
    waiting, verdict          on the target: it is prepared, its coordinator is gone, and this is what became of it
    stop                      on the source: `migrate abort` was here
/run/ferry/migrate/locks/     one file for each container that is being moved
/run/ferry/migrate/slots/     one file for each move that a host takes part in at a time
/var/lib/ferry/migrations/ID/ on both hosts, on disk, kept
    open                      while the move is not known to be over
    journal decision report.json    on the source
    target.json released            on the target
/var/lib/ferry/layers/        layers of overlays that other hosts sent, by their digests
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from migrate.errors import ProtocolError

RUN = Path(os.environ.get("FERRY_RUN_DIR", "/run/ferry/migrate"))
HISTORY = Path(os.environ.get("FERRY_HISTORY_DIR", "/var/lib/ferry/migrations"))
LAYERS = Path(os.environ.get("FERRY_LAYERS_DIR", "/var/lib/ferry/layers"))
# Of the images, as the runtime names them: the memory that comes after the restore, and which pages those are.
LATER, LATER_PAGES = "memory-later.img", "memory-later.json"

_ID = re.compile(r"[0-9a-z][0-9a-z-]{7,63}")
_CONTAINER = re.compile(r"[A-Za-z0-9_+.-]{1,255}")


def working(migration_id: str) -> Path:
    """Return the directory of a move under way. Raises: ProtocolError for what is no id."""
    if not isinstance(migration_id, str) or not _ID.fullmatch(migration_id):
        raise ProtocolError(f"{migration_id!r} is no migration id")
    return RUN / migration_id


def images(migration_id: str) -> Path:
    return working(migration_id) / "images"


def requests(migration_id: str) -> Path:
    """Return the FIFO by which a target asks for memory that comes after the restore."""
    return working(migration_id) / "requests"


def served(migration_id: str) -> Path:
    """Return what says on a target that all memory is there which comes after the restore."""
    return working(migration_id) / "served"


def lock(container: str) -> Path:
    """Return a container's lock. Raises: ProtocolError for what is no container id."""
    if not isinstance(container, str) or not _CONTAINER.fullmatch(container) or container in (".", ".."):
        raise ProtocolError(f"{container!r} is no container id")
    return RUN / "locks" / container


def slot(number: int) -> Path:
    return RUN / "slots" / str(number)


def history(migration_id: str) -> Path:
    working(migration_id)
    return HISTORY / migration_id


def decision(migration_id: str) -> Path:
    return history(migration_id) / "decision"


def released(migration_id: str) -> Path:
    return history(migration_id) / "released"
