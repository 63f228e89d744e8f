"""What a host keeps of the moves that it took part in: one directory each, with a file `open` in it until the move is over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from migrate import converge, durable, journal, places
from migrate.errors import MigrateError, Outcome, Unfinished, UnknownMigration
from migrate.recover import Decision

KEEP = 100
_TELLING = 5  # moves whose downtimes say what the next one's will be


@dataclass(frozen=True, slots=True)
class Record:
    """One move as this host knows it. `outcome` is "" while the move is not over, or its journal does not tell."""

    migration_id: str
    role: str  # source, target
    container: str
    source: str
    target: str
    started: str
    outcome: str
    open: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make(migration_id: str) -> Path:
    """Make the directory of a move, marked as open, on disk. Raises: MigrateError; nothing is left then."""
    directory = places.history(migration_id)
    try:
        directory.mkdir(mode=0o700, parents=True)
        try:
            os.close(os.open(directory / "open", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            durable.sync_directory(directory)
            durable.sync_directory(directory.parent)
        except OSError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    except OSError as e:
        raise MigrateError(f"cannot keep a record in {directory}: {e.strerror}", hint="is its disk full?") from e
    return directory


def close(migration_id: str) -> None:
    """Mark a move as over, and drop the oldest of those that are. Idempotent. Raises: OSError."""
    directory = places.history(migration_id)
    (directory / "open").unlink(missing_ok=True)
    if directory.exists():
        durable.sync_directory(directory)
    _prune()


def remove(migration_id: str) -> None:
    """Remove the directory of a move, at once or not at all. Idempotent."""
    directory = places.history(migration_id)
    gone = directory.with_name(f".{migration_id}")
    with contextlib.suppress(OSError):
        directory.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _prune() -> None:
    over = [d for d in _directories() if not (d / "open").exists()]
    for directory in (*over[:-KEEP], *places.HISTORY.glob(".*")):
        shutil.rmtree(directory, ignore_errors=True)


def _directories() -> list[Path]:
    """Return the directories of all moves, the oldest first: ids begin with the time."""
    with contextlib.suppress(OSError):
        return sorted(d for d in places.HISTORY.iterdir() if d.is_dir() and not d.is_symlink() and d.name[0] != ".")
    return []


def plan(directory: Path) -> dict[str, Any]:
    """Return the plan that the journal of a move begins with. Raises: MigrateError when it cannot be read any more."""
    try:
        entries, _ = journal.read(directory / "journal")
    except OSError as e:
        raise MigrateError(f"cannot read {directory / 'journal'}: {e.strerror}") from e
    for entry in entries:
        if (entry["phase"], entry["mark"]) == ("plan", "made") and {"container", "bundle", "target"} <= entry.keys():
            return entry
    raise MigrateError(
        f"the journal {directory / 'journal'} is damaged: it does not tell what was planned",
        hint="look on both hosts: runtime list. When one copy is where it should be, and runs, remove that directory",
    )


def target(directory: Path) -> dict[str, Any]:
    """Return what a target noted of a move before it made anything. Raises: MigrateError."""
    path = directory / "target.json"
    try:
        document = json.loads(path.read_bytes())
        return {**document, "container": str(document["container"]), "bundle": str(document["bundle"])}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise MigrateError(f"cannot read {path}: {e}") from e


@dataclass(frozen=True, slots=True)
class Left:
    """What the records of a source tell of a move that was left behind.

    `was_released`: the target is known to have run it. `ran_on`: the source is known to have let it go for good.
    """

    decision: Decision
    was_released: bool
    ran_on: bool


def left(directory: Path) -> Left:
    """Read what is left in the directory of a move; what is damaged makes it tell less, never something else. Raises: OSError."""
    word = durable.read(directory / "decision")
    decisions = {
        None: Decision.NONE,
        durable.UNDECIDED: Decision.NONE,
        durable.REVOKED: Decision.NONE,
        durable.COMMIT: Decision.COMMIT,
    }
    entries, _ = journal.read(directory / "journal")
    # While its memory follows, that it was released does not say that it lives: it may have been killed since.
    marks = {(e["phase"], e["mark"]) for e in entries if not e.get("later")}
    rolled_back = any(e["mark"] == "ended" and e.get("outcome") == Outcome.ROLLED_BACK for e in entries)
    return Left(
        decisions.get(word, Decision.DAMAGED),
        bool({("commit", "released"), ("commit", "served"), ("recover", "released")} & marks),
        word == durable.REVOKED or rolled_back,
    )


def was_released(migration_id: str) -> bool:
    """Say whether a target let the container of a move run, or may have: a word that was damaged counts. Raises: OSError."""
    return durable.read(places.released(migration_id)) not in (None, durable.UNDECIDED)


def _record(directory: Path) -> Record | None:
    still_open = (directory / "open").exists()
    with contextlib.suppress(MigrateError, OSError):
        if (directory / "target.json").exists():
            found = target(directory)
            source, other, started = (str(found.get(k, "")) for k in ("source", "target", "started"))
            outcome = "" if still_open else "COMPLETED" if was_released(directory.name) else "ROLLED_BACK"
            return Record(directory.name, "target", found["container"], source, other, started, outcome, still_open)
        entries, _ = journal.read(directory / "journal")
        outcomes = [str(e.get("outcome", "")) for e in entries if e["mark"] == "ended"]
        made: dict[str, Any] = {}
        with contextlib.suppress(MigrateError):
            made = plan(directory)
        container, source, other, started = (str(made.get(k, "")) for k in ("container", "source", "target", "time"))
        outcome = outcomes[-1] if outcomes else ""
        return Record(directory.name, "source", container, source, other, started, outcome, still_open)
    return Record(directory.name, "", "", "", "", "", "", still_open) if still_open else None


def all_records() -> list[Record]:
    """Return all moves that are kept, the oldest first; what cannot be read is left out unless it is open."""
    return [r for d in _directories() if (r := _record(d)) is not None]


def unfinished() -> list[Record]:
    """Return the moves that are not known to be over: under way, or left behind. Costs little when there is none."""
    return [r for d in _directories() if (d / "open").exists() and (r := _record(d)) is not None]


def require_settled(container: str) -> None:
    """Refuse a container of which an earlier move is not over. Raises: Unfinished."""
    for r in unfinished():
        if r.container == container and not (r.role == "target" and was_released(r.migration_id)):
            raise Unfinished(
                f"the move {r.migration_id} of {container} from {r.source} to {r.target} is not over",
                hint=f"migrate recover {r.migration_id}",
            )


def fixed_downtime_ms() -> float | None:
    """Return what a freeze cost besides its memory in the last moves from here that tell, their median; None where none does."""
    found: list[float] = []
    for directory in reversed(_directories()):
        if len(found) == _TELLING:
            break
        with contextlib.suppress(OSError, ValueError):
            if (value := converge.fixed_ms(json.loads((directory / "report.json").read_bytes()))) is not None:
                found.append(value)
    return statistics.median(found) if found else None


def find(migration_id: str) -> Record:
    """Return one move. Raises: UnknownMigration, ProtocolError."""
    directory = places.history(migration_id)
    record = _record(directory) if directory.is_dir() else None
    if record is None:
        raise UnknownMigration(f"there is no record of a move {migration_id} on this host", hint="see: migrate history")
    return record


def report(migration_id: str) -> dict[str, Any] | None:
    """Return the report of a move, None where none was written. Raises: MigrateError."""
    path = places.history(migration_id) / "report.json"
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise MigrateError(f"cannot read {path}: {e}") from e
    return document


def save_report(migration_id: str, document: dict[str, Any]) -> None:
    """Keep a report beside the journal. Raises: MigrateError."""
    path = places.history(migration_id) / "report.json"
    try:
        path.with_suffix(".new").write_text(json.dumps(document, indent=2) + "\n")
        path.with_suffix(".new").rename(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            path.with_suffix(".new").unlink()
        raise MigrateError(f"cannot write {path}: {e.strerror}") from e
