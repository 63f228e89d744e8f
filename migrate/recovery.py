"""Find the moves that were left behind on a host, and both hosts of each; resolve them."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from migrate.errors import MigrateError, Outcome
from migrate.host import Address
from migrate.report import Report
from migrate.resolve import Resolution, Resolver
from migrate.session import Place, Session

OnLine = Callable[[str], None]


def unfinished(session: Session) -> list[dict[str, Any]]:
    """Return the records of a host's moves that are not over. Raises: MigrateError."""
    found: list[dict[str, Any]] = session.call("records", only_open=True)["records"]
    return found


def left_behind(record: dict[str, Any]) -> bool:
    """Say whether a record is of a move that nobody is at work on."""
    return bool(record["open"]) and (not record["under_way"] or bool(record["waits"]))


def resolve(
    place: Place,
    migration_id: str,
    remote_command: str,
    on_line: OnLine,
    *,
    other: str = "",
    run_on: str = "",
    wait_s: float = 30.0,
) -> Resolution:
    """Bring a move that one host knows of to its end; `other` names the other host, "" where the record does.

    Raises: MigrateError; then all is as it was.
    """
    session = place.open(remote_command)
    try:
        found = session.call("plan", migration_id=migration_id)
    finally:
        session.close()
    key = "target_address" if found["role"] == "source" else "source_address"
    remote_command = str(found["plan"].get("remote_command") or remote_command) if place.is_here else remote_command
    second = Place.named(other) if other else _address(found["plan"].get(key), migration_id)
    source, target = (place, second) if found["role"] == "source" else (second, place)
    resolver = Resolver(
        migration_id=migration_id,
        source=source,
        target=target,
        remote_command=remote_command,
        coordinator=platform.node(),
        wait_s=wait_s,
        run_on=run_on,
        on_line=on_line,
    )
    return resolver.run(lambda resolution: _report(migration_id, resolution).as_dict())


def _address(document: Any, migration_id: str) -> Place:
    if not isinstance(document, dict):
        raise MigrateError(f"the record of {migration_id} does not tell the other host", hint="name it with --other HOST")
    address = Address.from_json(document)
    return Place.named(address.destination, address.port)


def _report(migration_id: str, resolution: Resolution) -> Report:
    plan = resolution.plan
    return Report(
        migration_id=migration_id,
        container=str(plan.get("container")),
        source=str(plan.get("source")),
        target=str(plan.get("target")),
        outcome=resolution.outcome,
        settled=resolution.settled,
        resolution=resolution.words,
        undo_errors=list(resolution.errors),
    )


def exit_code(resolutions: list[Resolution], failures: int) -> int:
    """Return 0 when all is settled, otherwise the worst that is left. Pure."""
    outcomes = {r.outcome for r in resolutions if not r.settled}
    if Outcome.SPLIT_BRAIN in outcomes:
        return 6
    return 5 if outcomes or failures else 0
