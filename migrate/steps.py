"""The steps of a move as a table: for each phase what is done on which host, and what undoes it.

An undo is idempotent, and is called for every step that was begun, the last one first. None of them says that the target may run:
that is in commit.py alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from migrate.converge import Pass, judge
from migrate.phase import Phase
from migrate.plan import Plan
from migrate.relay import Relay
from migrate.session import OnEvent, Place, Session

# A pass over the files is repeated while the last one sent more than this, but not for ever: a container that
# writes faster than the link carries would never be done.
SMALL_PASS_BYTES = 1 << 20
MAX_PASSES = 5
# What a freeze takes when nothing is left to send: CRIU's dump and restore of a small process, as docs/benchmarks.md has it.
FIXED_MS = 100.0


@dataclass(slots=True)
class Context:
    """What the steps act on."""

    plan: Plan
    source_place: Place
    target_place: Place
    source: Session
    target: Session
    on_event: OnEvent
    relays: list[Relay] = field(default_factory=list)


Details = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    phase: Phase
    do: Callable[[Context], Details]
    undo: Callable[[Context], None] | None = None


def _prepare(c: Context) -> Details:
    plan = c.plan
    origin = {k: getattr(plan, k) for k in ("source", "target", "source_address", "remote_command")}
    c.target.call(
        "prepare",
        migration_id=plan.migration_id,
        container=plan.container,
        bundle=plan.bundle,
        origin=origin,
        coordinator=plan.coordinator,
    )
    if plan.direct:
        c.source.call("open_data", address=plan.target_address, remote_command=plan.remote_command, name=plan.target)
    else:
        c.source.call("listen_data")
        c.relays.append(Relay(c.source_place, c.target_place, plan.remote_command, plan.migration_id))
        c.source.call("accept_data", name=plan.target)
    return {"data": "direct" if plan.direct else "through the coordinator"}


def _discard(c: Context) -> None:
    c.target.call("discard")


def _precopy(c: Context) -> Details:
    pre_copy = c.plan.pre_copy
    files = _file_passes(c)
    # Started while the container still runs, so that no process has to start in the downtime.
    flags = list(c.plan.criu_flags)
    memory = c.plan.memory_bytes
    c.target.call("hold_restore", flags=flags, memory_bytes=memory, pre_copy=pre_copy)
    passes = _memory_passes(c) if pre_copy else []
    c.source.call("hold_checkpoint", flags=flags, memory_bytes=memory)
    if pre_copy:
        # While the memory went, and CRIU was started, both went on changing.
        files += _file_passes(c)
        passes.append(c.source.call("send_memory", c.on_event, expected_bytes=0))
    return {"passes": files, **({"memory": passes} if passes else {})}


def _file_passes(c: Context) -> list[Details]:
    passes: list[Details] = []
    for _ in range(MAX_PASSES):
        shipped = c.source.call("ship_bundle", c.on_event)
        passes.append(shipped)
        if shipped["content_bytes"] <= SMALL_PASS_BYTES:
            break
    return passes


def _memory_passes(c: Context) -> list[Details]:
    """Send the memory again and again while the container runs; return each pass with what was decided after it."""
    c.source.call("follow", flags=list(c.plan.criu_flags))
    told: list[Details] = []
    passes: list[Pass] = []
    expected = c.plan.memory_bytes
    while True:
        sent = c.source.call("send_memory", c.on_event, expected_bytes=expected)
        passes.append(Pass(sent["content_bytes"], sent["seconds"]))
        verdict = judge(passes, c.plan.max_downtime_ms, FIXED_MS)
        told.append({**sent, **asdict(verdict)})
        c.on_event("iteration", {"number": len(passes), **told[-1]})
        expected = verdict.remaining_bytes
        if not verdict.go_on:
            return told


def _let_go(c: Context) -> None:
    # Nothing was decided, so that the target cannot run: the source need not wait for it.
    try:
        c.source.call("let_go")
    finally:
        c.target.call("abort")


def _freeze(c: Context) -> Details:
    return c.source.call("freeze", c.on_event)


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


def finish(c: Context) -> Details:
    """Clear up after the commit; return CRIU's statistics of the restore. Raises: MigrateError; recovery then does the rest.

    The source's files go only when the target's are known to be on disk.
    """
    stats = c.target.call("released")["stats"]
    c.target.call("settle")
    c.source.call("forget", keep_bundle=c.plan.keep_source)
    c.target.call("confirm")
    return {"restore_stats": stats}
