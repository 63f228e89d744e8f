"""The steps of a move as a table: for each phase what is done on which host, and what undoes it.

An undo is idempotent, and is called for every step that was begun, the last one first. None of them says that the target may run:
that is in commit.py alone.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from migrate.commit import Log
from migrate.converge import Diverge, Limits, Next, Pass, Verdict, judge
from migrate.errors import Diverged, NotShared, printable
from migrate.phase import Phase
from migrate.plan import Plan
from migrate.relay import Relay
from migrate.session import OnEvent, Place, Session
from migrate.timeline import Timeline

# A pass over the files is repeated while the last one sent more than this, but not for ever: a container that
# writes faster than the link carries would never be done.
SMALL_PASS_BYTES = 1 << 20
MAX_PASSES = 5


@dataclass(slots=True)
class Context:
    """What the steps act on."""

    plan: Plan
    source_place: Place
    target_place: Place
    source: Session
    target: Session
    log: Log
    timeline: Timeline
    on_event: OnEvent
    relays: list[Relay] = field(default_factory=list)
    later: bool = False  # what of the memory is left is sent when the container runs on the target already
    missing_layers: dict[str, str] = field(default_factory=dict)  # where they go on the target, by their digests


Details = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    phase: Phase
    do: Callable[[Context], Details]
    undo: Callable[[Context], None] | None = None


def _prepare(c: Context) -> Details:
    plan = c.plan
    origin = {k: getattr(plan, k) for k in ("source", "target", "source_address", "remote_command")}
    prepared = c.target.call(
        "prepare",
        migration_id=plan.migration_id,
        container=plan.container,
        bundle=plan.bundle,
        origin=origin,
        coordinator=plan.coordinator,
        network=plan.network,
        volumes=list(plan.volumes),
        shared=list(plan.shared),
        overlay=plan.overlay,
    )
    c.missing_layers = {str(d): str(p) for d, p in prepared["layers"].items()}
    for path in plan.shared:
        _see_shared(c, path)
    if plan.direct:
        c.source.call(
            "open_data", address=plan.target_address, remote_command=plan.remote_command, name=plan.target, sending=plan.sending
        )
    else:
        c.source.call("listen_data")
        c.relays.append(Relay(c.source_place, c.target_place, plan.remote_command, plan.migration_id))
        c.source.call("accept_data", name=plan.target, sending=plan.sending)
    return {"data": "direct" if plan.direct else "through the coordinator", "connections": plan.parallel}


def _see_shared(c: Context, path: str) -> None:
    """See that a directory is the same storage on both hosts. Raises: NotShared, MigrateError.

    A network's file system says which one it is. Of others, what is done to it on one host must show on the other: its time of
    modification is another one for a moment.
    """
    here = c.source.call("source_storage", path=path)["storage"]
    there = c.target.call("target_storage", path=path)["storage"]
    seen = bool(here) and here == there
    if not here and not there:
        stamp = 1 + secrets.randbelow(1 << 30)
        try:
            c.source.call("stamp", path=path, mtime_s=stamp)
            seen = bool(c.target.call("sees", path=path, mtime_s=stamp)["seen"])
        finally:
            c.source.call("unstamp", path=path)
    if not seen:
        raise NotShared(
            f"{path} is not the same storage on {c.plan.source} and {c.plan.target}",
            hint="mount it there, or move it along: --volume NAME=copy",
        )


def _discard(c: Context) -> None:
    c.target.call("discard")


def _precopy(c: Context) -> Details:
    pre_copy = c.plan.pre_copy
    layers = _layers(c)
    files = _file_passes(c)
    # Started while the container still runs, so that no process has to start in the downtime.
    flags = list(c.plan.criu_flags)
    memory = c.plan.memory_bytes
    with c.timeline.span("start the restore", "target"):
        c.target.call("hold_restore", flags=flags, memory_bytes=memory, pre_copy=pre_copy)
    passes = _MemoryPasses(c)
    if pre_copy:
        passes.run()
    with c.timeline.span("start the checkpoint", "source"):
        c.source.call("hold_checkpoint", flags=flags, memory_bytes=memory)
    if pre_copy:
        # While the memory went, and CRIU was started, both went on changing.
        files += _file_passes(c)
        if not c.later:
            passes.run()
    return {"passes": files, **({"memory": passes.told} if pre_copy else {}), **layers}


def _layers(c: Context) -> Details:
    """Send the layers of an overlay that the target has not; they do not change while the container runs."""
    if not c.missing_layers:
        return {}
    with c.timeline.span("layers", "source"):
        shipped = c.source.call("ship_layers", c.on_event, missing=c.missing_layers)
    with c.timeline.span("check the layers", "target"):
        c.target.call("keep_layers")
    return {"layers": {**shipped, "count": len(c.missing_layers)}}


def _file_passes(c: Context) -> list[Details]:
    passes: list[Details] = []
    for _ in range(MAX_PASSES):
        with c.timeline.span("files", "source"):
            shipped = c.source.call("ship_bundle", c.on_event)
        passes.append(shipped)
        if shipped["content_bytes"] <= SMALL_PASS_BYTES:
            break
    return passes


class _MemoryPasses:
    """Sends the memory again and again while the container runs; `told` has each pass with what was decided after it."""

    def __init__(self, c: Context) -> None:
        self._c = c
        self._limits = Limits(c.plan.max_downtime_ms, c.plan.fixed_downtime_ms, Diverge(c.plan.on_diverge))
        self._passes: list[Pass] = []
        self._began: float | None = None
        self._expected_bytes, self._allowance = c.plan.memory_bytes, 100
        self.told: list[Details] = []

    def run(self) -> None:
        """Go on until it is time to freeze; what was some time ago says nothing of now.

        Raises: Diverged when the container is to stay where it is rather than to stand still for longer than allowed.
        """
        c = self._c
        if self._began is None:
            with c.timeline.span("follow the memory", "source"):
                c.source.call("follow", flags=list(c.plan.criu_flags))
        since = len(self._passes)
        while True:
            sent = self._send()
            verdict = judge(self._passes, self._limits, self._allowance, since)
            if verdict.next == Next.THROTTLE:
                verdict = self._slow_down(verdict)
                since = len(self._passes)
            self.told.append({"number": len(self._passes), **sent, **asdict(verdict)})
            c.log.append(Phase.PRECOPY, "pass", **self.told[-1])
            c.on_event("iteration", self.told[-1])
            self._expected_bytes, self._allowance = verdict.remaining_bytes, verdict.allowance
            if verdict.next == Next.ABORT:
                hint = "allow more with --max-downtime, or slow the container down with --on-diverge throttle"
                raise Diverged(verdict.reason, hint=hint)
            if verdict.next in (Next.FREEZE, Next.LAZY):
                c.later = verdict.next == Next.LAZY
                return

    def _send(self) -> Details:
        c, before = self._c, self._began
        self._began = time.monotonic()
        with c.timeline.span(f"memory, pass {len(self._passes) + 1}", "source"):
            sent = c.source.call("send_memory", c.on_event, expected_bytes=self._expected_bytes)
        since_s = None if before is None else self._began - before
        self._passes.append(Pass(sent["content_bytes"], sent["seconds"], since_s, sent["link_rate"]))
        return sent

    def _slow_down(self, verdict: Verdict) -> Verdict:
        slowed = self._c.source.call("throttle", percent=verdict.allowance)
        if slowed["cpus"] is not None:
            return verdict
        reason = f"it cannot be slowed down: {printable(str(slowed['reason']))[:300]}"
        return replace(verdict, next=Next.FREEZE, reason=reason, allowance=self._allowance)


def _told(c: Context, where: str, verb: str, **arguments: Any) -> Details:
    """Call a verb that tells what it did when."""
    started = time.monotonic()
    details = (c.source if where == "source" else c.target).call(verb, c.on_event, **arguments)
    c.timeline.take(details.pop("spans", None), where, started)
    return details


def _let_go(c: Context) -> None:
    # Nothing was decided, so that the target cannot run: the source need not wait for it.
    try:
        c.source.call("let_go")
    finally:
        c.target.call("abort")


def _freeze(c: Context) -> Details:
    return _told(c, "source", "freeze", later=c.later)


def _ship(c: Context) -> Details:
    details = _told(c, "source", "ship_images")
    if c.later:
        c.source.call("serve")  # what the restore itself touches is needed already
    return details


def _restore(c: Context) -> Details:
    return _told(c, "target", "restore")


STEPS: tuple[Step, ...] = (
    Step(Phase.PREPARE, _prepare, _discard),
    Step(Phase.PRECOPY, _precopy, _let_go),
    Step(Phase.FREEZE, _freeze),
    Step(Phase.SHIP, _ship),
    Step(Phase.RESTORE, _restore),
)


def finish(c: Context) -> Details:
    """Clear up after the commit; return CRIU's statistics of the restore, and how the memory was filled in after it.

    The source's files go only when the target's are known to be on disk. Raises: MigrateError; recovery then does the rest.
    """
    stats = c.target.call("released")["stats"]
    c.target.call("settle")
    c.source.call("forget", keep_bundle=c.plan.keep_source)
    with c.timeline.span("memory is filled in", "target"):
        drain = c.target.call("drained")
    c.target.call("confirm")
    return {"restore_stats": stats, "drain": drain}
