"""The steps of a move as a table: for each phase what is done on which host, and what undoes it.

An undo is idempotent, and is called for every step that was begun, the last one first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from migrate import host as hosts
from migrate.errors import ConnectionLost, MigrateError
from migrate.host import Host
from migrate.phase import Phase
from migrate.plan import Plan
from migrate.session import OnEvent, Session

# A pass over the files is repeated while the last one sent more than this, but not for ever: a container that
# writes faster than the link carries would never be done.
SMALL_PASS_BYTES = 1 << 20
MAX_PASSES = 5


@dataclass(frozen=True, slots=True)
class Context:
    """What the steps act on."""

    plan: Plan
    source: Session
    target: Session
    host: Host
    remote_command: str
    on_event: OnEvent


Details = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    phase: Phase
    do: Callable[[Context], Details]
    undo: Callable[[Context], None] | None = None


def _prepare(c: Context) -> Details:
    plan = c.plan
    c.source.call("begin", migration_id=plan.migration_id, container=plan.container)
    c.target.call("begin", migration_id=plan.migration_id, container=plan.container)
    c.target.call("prepare", bundle=plan.bundle)
    argv = hosts.bulk_command(c.host, f"{c.remote_command} agent")
    c.source.call("open_data", argv=argv, name=c.host.name)
    return {}


def _discard(c: Context) -> None:
    try:
        c.target.call("discard")
    finally:
        c.source.call("leave")


def _precopy(c: Context) -> Details:
    passes = []
    for _ in range(MAX_PASSES):
        shipped = c.source.call("ship_bundle", c.on_event, bundle=c.plan.bundle)
        passes.append(shipped)
        if shipped["content_bytes"] <= SMALL_PASS_BYTES:
            break
    # Started while the container still runs, so that no process has to start in the downtime.
    flags = list(c.plan.criu_flags)
    memory = c.plan.memory_bytes
    c.target.call("hold_restore", container=c.plan.container, bundle=c.plan.bundle, flags=flags, memory_bytes=memory)
    c.source.call("hold_checkpoint", container=c.plan.container, flags=flags, memory_bytes=memory)
    return {"passes": passes}


def _let_go(c: Context) -> None:
    # The target first: it must not run before the source does.
    try:
        c.target.call("abort")
    finally:
        c.source.call("abort")


def _freeze(c: Context) -> Details:
    return c.source.call("freeze", c.on_event, bundle=c.plan.bundle)


def _ship(c: Context) -> Details:
    return c.source.call("ship_images", c.on_event)


def _restore(c: Context) -> Details:
    return c.target.call("restore")


STEPS: tuple[Step, ...] = (
    Step(Phase.PREPARE, _prepare, _discard),
    Step(Phase.PRECOPY, _precopy, _let_go),
    Step(Phase.FREEZE, _freeze),
    Step(Phase.SHIP, _ship),
    Step(Phase.RESTORE, _restore),
)


def finish(c: Context, reopen: Callable[[], Session]) -> tuple[Details, list[str]]:
    """Clear up after the commit; return CRIU's statistics of the restore, and what could not be done.

    The source's files go only when the target's are known to be on disk.
    """
    errors: list[str] = []
    details: Details = {}
    keep = c.plan.keep_source
    try:
        details["restore_stats"] = _settle(c, reopen)
    except MigrateError as e:
        keep = True
        errors.append(f"{c.plan.target}: its files are not known to be on disk: {e}; {c.plan.bundle} is kept on {c.plan.source}")
    bundle = None if keep else c.plan.bundle
    last: tuple[tuple[Session, Callable[[], Details]], ...] = (
        (c.source, lambda: c.source.call("forget", container=c.plan.container, bundle=bundle)),
        (c.source, lambda: c.source.call("leave")),
        (c.target, lambda: c.target.call("leave")),
    )
    for session, action in last:
        try:
            action()
        except ConnectionLost:
            continue  # an agent that is cut off leaves by itself
        except MigrateError as e:
            errors.append(f"{session.name}: {e}")
    return details, errors


def _settle(c: Context, reopen: Callable[[], Session]) -> Details:
    try:
        stats: Details = c.target.call("done")["stats"]
        c.target.call("settle")
        return stats
    except ConnectionLost:
        again = reopen()
        try:
            again.call("settle")
        finally:
            again.close()
        return {}
