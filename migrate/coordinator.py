"""One move, from preflight to report: walks the steps, journals each, undoes them when one fails.

It may run on the source, on the target, or on a third host: it talks to both through agents, and keeps nothing itself.
"""

from __future__ import annotations

import contextlib
import platform
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from migrate import commit, facts, faults, plan, preflight, steps
from migrate.commit import Log
from migrate.errors import ConnectionLost, MemoryLost, MigrateError, Outcome, ProtocolError, Refused, UnknownMigration, printable
from migrate.facts import ContainerFacts, HostFacts
from migrate.liveness import DEAD_AFTER_S
from migrate.phase import Phase
from migrate.plan import Plan, Request, Route
from migrate.preflight import Finding
from migrate.report import Report
from migrate.resolve import Resolution, Resolver
from migrate.session import Place, Session
from migrate.steps import Context
from migrate.timeline import Timeline

# (phase, event name, fields); the names are begin, end, note, and what agents report
OnProgress = Callable[[Phase, str, dict[str, Any]], None]
# How long hosts that do not answer after the decision are asked again before the outcome is IN_DOUBT.
_PATIENCE_S = max(2 * DEAD_AFTER_S, 10.0)
# Until what a killed agent has left behind has ended: a dump under way is finished first.
_WAIT_S = 600.0


class Interrupted(MigrateError):
    """The user pressed ^C, or ended this process."""

    code = "interrupted"


class Survey:
    """Both hosts, connected and looked at. Raises (constructor): MigrateError; nothing was touched."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.source_place, self.target_place = Place.named(request.source), Place.named(request.target)
        self._sessions: list[Session] = []
        try:
            self.source = self._open(self.source_place)
            self.target = self._open(self.target_place)
            found = self.source.call(
                "container", container=request.container, flags=request.criu_flags, volumes=dict(request.volumes)
            )["container"]
            self.container: ContainerFacts | None = None if found is None else facts.container_from_json(found)
            if self.container is not None and self.container.network is not None and not request.tcp_close:
                self._keep_connections(self.container)
            self.source_facts = _look(self.source, needs=self.container.needs.as_dict() if self.container else {})
            self.target_facts = _look(
                self.target,
                container=request.container,
                bundle=self.container.bundle.path if self.container else None,
                cpu=self.source_facts.cpu,
                needs=self.container.needs.as_dict() if self.container else {},
            )
            self.route, unreached = self._route()
        except (KeyError, TypeError, ValueError) as e:
            self.close()
            raise MigrateError(f"a host sent facts that are none: {e}", hint="is the same version of Ferry on both hosts?") from e
        except BaseException:
            self.close()
            raise
        found_all = preflight.examine(request.container, self.source_facts, self.container, self.target_facts)
        found_all += preflight.route(self.source_facts.hostname, self.target_facts.hostname, unreached)
        self.findings: list[Finding] = preflight.ignore(found_all, self.request.ignore)

    def _keep_connections(self, container: ContainerFacts) -> None:
        """Its addresses move along, so that its connections can: nobody has to ask for that."""
        self.request = replace(self.request, tcp_established=True)
        kept = tuple(f for f in container.findings if f["code"] not in ("tcp-established", "tcp-address"))
        self.container = replace(container, findings=kept)

    def _open(self, place: Place) -> Session:
        session = place.open(self.request.remote_command)
        self._sessions.append(session)
        return session

    def _route(self) -> tuple[Route, str | None]:
        """Return how the hosts find each other, and why the source does not reach the target: None where nobody asked it."""
        source, target = self.source_place, self.target_place

        def seen(place: Place, from_host: Place, hostname: str) -> dict[str, Any]:
            if place.host is None:  # under which name others know this host is not known; its own is the best guess
                return {"destination": hostname, "port": 0}
            return place.host.address(seen_from_here=from_host.is_here).as_dict()

        source_address = seen(source, target, self.source_facts.hostname)
        target_address = seen(target, source, self.target_facts.hostname)
        unreached: str | None = None
        if not source.is_here and not target.is_here:
            answer = self.source.call("reach", address=target_address, remote_command=self.request.remote_command)
            unreached = str(answer["error"])
        direct = source.is_here or (not target.is_here and not unreached)
        return Route(platform.node(), source_address, target_address, direct), unreached

    def close(self) -> None:
        """Close the connections; what is undecided is let go. Idempotent."""
        # The source first: nothing was decided, or it stays frozen, and while the target ends it should run.
        for session in self._sessions:
            session.close()

    def plan(self) -> Plan:
        """Return the plan. Raises: Refused with every finding that is in the way."""
        refusals = preflight.refusals(self.findings)
        if refusals or self.container is None:
            lines = [f"{f.words} [{f.code}]{': ' + f.remedy if f.remedy else ''}" for f in refusals]
            raise Refused("\n".join(lines))
        reason = plan.can_pre_copy(self.source_facts, self.container, self.target_facts)
        if reason and self.request.pre_copy == "always":
            raise Refused(reason, hint="--pre-copy auto does without where it must")
        if self.request.on_diverge != "switch" and (reason or self.request.pre_copy == "never"):
            why = reason or "the memory is not sent while the container runs"
            raise Refused(f"--on-diverge {self.request.on_diverge} cannot be done: {why}", hint="--pre-copy auto or always")
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        migration_id = f"{stamp}-{secrets.token_hex(3)}"
        return plan.make(self.request, migration_id, self.source_facts, self.container, self.target_facts, self.route)


def _look(session: Session, **arguments: Any) -> HostFacts:
    """Return a host's facts, with its clock as the difference to ours, as far as that is known."""
    before_ns = time.time_ns()
    found = facts.host_from_json(session.call("facts", **arguments))
    # It read its clock after we asked and before we had the answer.
    nearest_ns = min(max(found.clock_ns, before_ns), time.time_ns())
    return replace(found, clock_ns=found.clock_ns - nearest_ns)


@contextlib.contextmanager
def _ends_like_interrupt() -> Iterator[None]:
    """Have SIGTERM and SIGHUP do what ^C does."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(n, signal.default_int_handler) for n in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def move(request: Request, on_progress: OnProgress) -> Report:
    """Move a container; the report says how it ended. Does not raise MigrateError."""
    started = time.monotonic()
    report = Report("", request.container, request.source, request.target)
    survey: Survey | None = None
    with _ends_like_interrupt():
        try:
            try:
                on_progress(Phase.PREFLIGHT, "begin", {})
                survey = Survey(request)
                report.source, report.target = survey.source_facts.hostname, survey.target_facts.hostname
                report.findings = [f.as_dict() for f in survey.findings]
                decided = survey.plan()
                report.migration_id = decided.migration_id
                report.phases_ms[Phase.PREFLIGHT] = (time.monotonic() - started) * 1000
                on_progress(Phase.PREFLIGHT, "end", {})
            except MigrateError as e:
                report.error = e.as_dict()
                return report
            except KeyboardInterrupt:
                report.error = Interrupted("interrupted before anything was touched").as_dict()
                return report
            _Move(survey, decided, report, on_progress, started).run()
            return report
        finally:
            if survey is not None:
                survey.close()


class _Move:
    def __init__(self, survey: Survey, decided: Plan, report: Report, on_progress: OnProgress, started: float) -> None:
        self._survey, self._plan, self._report = survey, decided, report
        self._on_progress, self._started = on_progress, started
        self._phase = Phase.PREPARE
        self._timeline = Timeline(started)
        self._timeline.add(Phase.PREFLIGHT, "coordinator", started, report.phases_ms[Phase.PREFLIGHT] / 1000)
        self._log = Log(survey.source, self._timeline)
        self._context = Context(
            plan=decided,
            source_place=survey.source_place,
            target_place=survey.target_place,
            source=survey.source,
            target=survey.target,
            log=self._log,
            timeline=self._timeline,
            on_event=self._on_event,
        )
        self._begun: list[steps.Step] = []
        self._frozen_at: float | None = None
        self._asked = self._interrupted = self._served = False

    def run(self) -> None:
        try:
            try:
                with faults.around("plan.made"):
                    self._context.source.call(
                        "begin",
                        migration_id=self._plan.migration_id,
                        container=self._plan.container,
                        plan=self._plan.as_dict(),
                        coordinator=self._plan.coordinator,
                    )
            except ConnectionLost:
                raise
            except MigrateError as e:
                self._report.error = e.as_dict()  # refused, or without a journal: nothing was touched
                return
            for step in steps.STEPS:
                self._begun.append(step)
                self._step(step)
            self._commit()
            self._finish()
        except MigrateError as e:
            self._failed(e)
        except (TypeError, ValueError, KeyError) as e:
            self._failed(ProtocolError(f"a host sent something that is no answer: {e!r}"))
        except KeyboardInterrupt:
            self._failed(Interrupted(f"interrupted in phase {self._phase}"))
        finally:
            for relay in self._context.relays:
                relay.close()
            self._report.total_ms = (time.monotonic() - self._started) * 1000

    def _on_event(self, name: str, fields: dict[str, Any]) -> None:
        if name == "iteration":
            self._report.iterations.append(fields)
        self._on_progress(self._phase, name, fields)

    def _begin(self, phase: Phase) -> float:
        self._phase = phase
        if phase == Phase.FREEZE:
            self._frozen_at = time.monotonic()
            self._report.frozen_at_ms = (self._frozen_at - self._started) * 1000
        if phase != Phase.COMMIT:
            self._log.append(phase, "intent")
        self._on_progress(phase, "begin", {})
        return time.monotonic()

    def _end(self, phase: Phase, started: float, details: dict[str, Any]) -> None:
        elapsed_ms = (time.monotonic() - started) * 1000
        self._report.phases_ms[phase] = elapsed_ms
        self._report.details[phase] = details
        self._log.append(phase, "result", elapsed_ms=round(elapsed_ms, 1), **details)
        self._on_progress(phase, "end", {"elapsed_ms": elapsed_ms, **details})

    def _step(self, step: steps.Step) -> None:
        started = self._begin(step.phase)
        with self._timeline.span(step.phase):
            details = step.do(self._context)
        self._end(step.phase, started, details)

    def _commit(self) -> None:
        started = self._begin(Phase.COMMIT)
        with self._timeline.span(Phase.COMMIT):
            details = commit.commit(
                self._context.source,
                self._context.target,
                self._log,
                self._timeline,
                self._on_asked,
                self._on_released,
                self._on_served,
                self._context.later,
            )
        self._end(Phase.COMMIT, started, details)

    def _on_asked(self) -> None:
        """From here on ^C must not tear anything down: the move goes forward, and says so."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: setattr(self, "_interrupted", True))
        self._asked = True

    def _on_released(self) -> None:
        assert self._frozen_at is not None
        self._report.downtime_ms = (time.monotonic() - self._frozen_at) * 1000
        self._report.outcome = Outcome.COMPLETED

    def _on_served(self) -> None:
        self._served = True

    def _finish(self) -> None:
        started = self._begin(Phase.FINISH)
        with self._timeline.span(Phase.FINISH):
            finished = steps.finish(self._context)
        if reason := finished["drain"].get("failed"):
            words = f"{self._plan.container} was killed on {self._plan.target}: {printable(str(reason))[:1000]}"
            hint = f"start it anew there, from its files: runtime delete {self._plan.container}, then runtime run"
            self._report.error = MemoryLost(words, hint=hint).as_dict()
        self._count_bytes()
        self._end(Phase.FINISH, started, finished)
        self._over(Outcome.COMPLETED)
        self._say_interrupted()

    def _over(self, outcome: Outcome) -> None:
        """Write how it ended, where nothing is left to do. Raises: MigrateError when the source's agent is gone."""
        report, context = self._report, self._context
        report.outcome = outcome
        self._note_times()
        with faults.around("move.ended"):
            try:
                context.source.call("ended", outcome=str(outcome), settled=True, fields={}, report=report.as_dict())
            except MigrateError as e:
                if isinstance(e, (ConnectionLost, ProtocolError)):
                    raise
                report.undo_errors.append(str(e))  # on a full disk it is over all the same
        with contextlib.suppress(MigrateError):
            context.source.call("leave")

    def _note_times(self) -> None:
        self._report.timeline = self._timeline.as_list()
        self._report.total_ms = (time.monotonic() - self._started) * 1000

    def _count_bytes(self) -> None:
        details = self._report.details
        shipped = [
            *details[Phase.PRECOPY]["passes"],
            *details[Phase.PRECOPY].get("memory", []),
            details[Phase.FREEZE]["pages"],
            details[Phase.SHIP],
        ]
        self._report.wire_bytes = max(s["wire_bytes"] for s in shipped) + self._context.target.wire_bytes

    def _say_interrupted(self) -> None:
        if self._interrupted:
            self._on_progress(self._phase, "note", {"words": "interrupted after the decision: the move went forward"})

    def _failed(self, error: MigrateError) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # another ^C must not leave half of it undone
        self._report.error = error.as_dict()
        # What failed after the decision, or could not be undone, is looked at with fresh eyes on both hosts.
        if self._asked or not self._roll_back():
            self._resolve()
        self._say_interrupted()

    def _roll_back(self) -> bool:
        """Undo what was begun, the last step first; say whether all of it could be."""
        context, report = self._context, self._report
        self._try(self._log.append, self._phase, "failed", error=report.error)
        undone = True
        for step in reversed(self._begun):
            if step.undo is not None:
                undone = self._try(step.undo, context) and undone
        return undone and self._try(self._over, Outcome.ROLLED_BACK)

    def _try(self, action: Callable[..., Any], *arguments: Any, **fields: Any) -> bool:
        try:
            action(*arguments, **fields)
        except MigrateError as e:
            self._report.undo_errors.append(str(e))
            return False
        return True

    def _resolve(self) -> None:
        """Find out what became of it, and bring it to its end."""
        report = self._report
        # Without all of its memory it may have been killed since.
        released = report.outcome == Outcome.COMPLETED and (self._served or not self._context.later)
        self._survey.close()
        resolver = Resolver(
            migration_id=self._plan.migration_id,
            source=self._survey.source_place,
            target=self._survey.target_place,
            remote_command=self._plan.remote_command,
            coordinator=self._plan.coordinator,
            wait_s=_WAIT_S,
            patience_s=_PATIENCE_S if self._asked else 0.0,
            thaw_at_once=not self._asked,
            was_released=released,
            on_line=lambda line: self._on_progress(self._phase, "note", {"words": line}),
        )
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                resolver.run(self._resolved)
                return
            except UnknownMigration:
                report.outcome = Outcome.ROLLED_BACK  # the source's agent was gone before it had begun
                return
            except MigrateError as e:
                if time.monotonic() > deadline:
                    report.outcome = Outcome.COMPLETED if released else Outcome.IN_DOUBT if self._asked else Outcome.ROLLED_BACK
                    report.undo_errors.append(f"{e}; migrate recover {self._plan.migration_id}")
                    return
                time.sleep(1.0)

    def _resolved(self, resolution: Resolution) -> dict[str, Any]:
        """Take over what came of it. Returns the report."""
        report = self._report
        report.outcome = resolution.outcome
        # What could not be undone then was resolved now; what still could not is named.
        report.undo_errors = list(resolution.errors)
        report.resolution = resolution.words
        report.settled = resolution.settled
        if resolution.outcome == Outcome.COMPLETED:
            report.recovered = report.error
            report.error = None
        self._note_times()
        return report.as_dict()
