"""One move, from preflight to report: walks the steps, journals each, undoes them when one fails."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from migrate import commit, facts, host, places, plan, preflight, steps
from migrate.errors import ConnectionLost, Locked, MigrateError, Outcome, Refused
from migrate.facts import ContainerFacts, HostFacts
from migrate.journal import Journal
from migrate.phase import Phase
from migrate.plan import Plan, Request
from migrate.preflight import Finding
from migrate.report import Report
from migrate.session import Session, open_local, open_remote
from migrate.steps import Context

# (phase, event name, fields); the names are begin, end, and what agents report
OnProgress = Callable[[Phase, str, dict[str, Any]], None]


class Interrupted(MigrateError):
    """The user pressed ^C."""

    code = "interrupted"


class Survey:
    """Both hosts, connected and looked at. Raises (constructor): MigrateError; nothing was touched."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.host = host.resolve(request.host)
        self._sessions: list[Session] = []
        try:
            self.source = self._open(open_local())
            self.target = self._open(open_remote(self.host, request.remote_command))
            found = self.source.call("container", container=request.container, flags=request.criu_flags)["container"]
            self.container: ContainerFacts | None = None if found is None else facts.container_from_json(found)
            self.source_facts: HostFacts = facts.host_from_json(self.source.call("facts"))
            bundle = self.container.bundle if self.container else None
            before_ns = time.time_ns()
            self.target_facts: HostFacts = facts.host_from_json(
                self.target.call(
                    "facts",
                    container=request.container,
                    bundle=bundle.path if bundle else None,
                    bind_sources=list(bundle.bind_sources) if bundle else [],
                    cpu=self.source_facts.cpu,
                )
            )
            # The source's clock is ours. The target read its own after we asked and before we had the answer: no more is known.
            nearest_ns = min(max(self.target_facts.clock_ns, before_ns), time.time_ns())
            self.source_facts = replace(self.source_facts, clock_ns=nearest_ns)
        except BaseException:
            self.close()
            raise
        self.findings: list[Finding] = preflight.examine(request.container, self.source_facts, self.container, self.target_facts)

    def _open(self, session: Session) -> Session:
        self._sessions.append(session)
        return session

    def close(self) -> None:
        """Close the connections; what is undecided is let go. Idempotent."""
        # The target first: it kills what is held there before the source runs on.
        for session in reversed(self._sessions):
            session.close()

    def plan(self) -> Plan:
        """Return the plan. Raises: Refused with every finding that is in the way."""
        refusals = preflight.refusals(self.findings)
        if refusals or self.container is None:
            lines = [f"{f.words} [{f.code}]{': ' + f.remedy if f.remedy else ''}" for f in refusals]
            raise Refused("\n".join(lines))
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        return plan.make(self.request, f"{stamp}-{secrets.token_hex(3)}", self.source_facts, self.container, self.target_facts)


def move(request: Request, on_progress: OnProgress) -> Report:
    """Move a container; the report says how it ended. Does not raise MigrateError."""
    started = time.monotonic()
    report = Report("", request.container, "this host", request.host)
    survey: Survey | None = None
    try:
        try:
            on_progress(Phase.PREFLIGHT, "begin", {})
            survey = Survey(request)
            report.source, report.target = survey.source_facts.hostname, survey.target_facts.hostname
            report.findings = [f.as_dict() for f in survey.findings]
            decided = survey.plan()
            report.migration_id = decided.migration_id
            journal = Journal(places.history(decided.migration_id))
            report.phases_ms[Phase.PREFLIGHT] = (time.monotonic() - started) * 1000
            on_progress(Phase.PREFLIGHT, "end", {})
        except MigrateError as e:
            report.error = e.as_dict()
            return report
        except KeyboardInterrupt:
            report.error = Interrupted("interrupted before anything was touched").as_dict()
            return report
        _Move(survey, decided, journal, report, on_progress).run()
        report.total_ms = (time.monotonic() - started) * 1000
        try:
            journal.report(report.as_dict())
        except MigrateError as e:
            report.undo_errors.append(str(e))
        journal.close()
        return report
    finally:
        if survey is not None:
            survey.close()


class _Move:
    def __init__(self, survey: Survey, decided: Plan, journal: Journal, report: Report, on_progress: OnProgress) -> None:
        self._survey, self._plan, self._journal, self._report = survey, decided, journal, report
        self._on_progress = on_progress
        self._phase = Phase.PREPARE
        self._context = Context(
            plan=decided,
            source=survey.source,
            target=survey.target,
            host=survey.host,
            remote_command=survey.request.remote_command,
            on_event=lambda name, fields: on_progress(self._phase, name, fields),
        )
        self._frozen_at: float | None = None

    def run(self) -> None:
        report = self._report
        begun: list[steps.Step] = []
        try:
            self._journal.append("plan", "made", **self._plan.as_dict())
            for step in steps.STEPS:
                begun.append(step)
                self._step(step)
            # From the decision on ^C must not tear anything down; it is let through when the move is over.
            previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                self._begin(Phase.COMMIT)
                self._context.source.call("decide")
            except BaseException:
                signal.signal(signal.SIGINT, previous)
                raise
        except MigrateError as e:
            self._roll_back(begun, e)
            return
        except KeyboardInterrupt:
            self._roll_back(begun, Interrupted(f"interrupted in phase {self._phase}"))
            return
        try:
            self._go_forward(begun)
        except MigrateError as e:
            report.error = e.as_dict()
        finally:
            signal.signal(signal.SIGINT, previous)

    def _begin(self, phase: Phase) -> float:
        self._phase = phase
        if phase == Phase.FREEZE:
            self._frozen_at = time.monotonic()
        self._journal.append(phase, "intent", durable=phase == Phase.COMMIT)
        self._on_progress(phase, "begin", {})
        return time.monotonic()

    def _end(self, phase: Phase, started: float, details: dict[str, Any]) -> None:
        elapsed_ms = (time.monotonic() - started) * 1000
        self._journal.append(phase, "result", elapsed_ms=round(elapsed_ms, 1), **details)
        self._report.phases_ms[phase] = elapsed_ms
        self._report.details[phase] = details
        self._on_progress(phase, "end", {"elapsed_ms": elapsed_ms, **details})

    def _step(self, step: steps.Step) -> None:
        started = self._begin(step.phase)
        details = step.do(self._context)
        self._end(step.phase, started, details)

    def _roll_back(self, begun: list[steps.Step], error: MigrateError) -> None:
        report = self._report
        report.error = error.as_dict()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second ^C must not leave half of it undone
        self._try(self._journal.append, self._phase, "failed", error=error.as_dict())
        for step in reversed(begun):
            if step.undo is not None:
                self._try(step.undo, self._context)
        # An agent that is gone, or was not reached, undoes its part by itself; closing waits for ours to have done so.
        self._survey.close()
        # Another move has the container: this one never had it.
        report.outcome = Outcome.REFUSED if isinstance(error, Locked) else Outcome.ROLLED_BACK
        self._try(self._journal.append, self._phase, "rolled-back", undo_errors=report.undo_errors)

    def _try(self, action: Callable[..., Any], *arguments: Any, **fields: Any) -> None:
        try:
            action(*arguments, **fields)
        except MigrateError as e:
            self._report.undo_errors.append(str(e))

    def _go_forward(self, begun: list[steps.Step]) -> None:
        report, context = self._report, self._context
        report.outcome = Outcome.IN_DOUBT
        started = time.monotonic()

        def reopen() -> Session:
            return open_remote(context.host, context.remote_command)

        if not commit.release_target(context.target, reopen, self._plan.migration_id, self._plan.container):
            context.source.call("revoke")
            self._roll_back(
                begun,
                ConnectionLost(
                    f"the connection to {context.target.name} was lost before {self._plan.container} could be released"
                ),
            )
            return
        assert self._frozen_at is not None
        report.downtime_ms = (time.monotonic() - self._frozen_at) * 1000
        report.outcome = Outcome.COMPLETED
        # Nothing after the decision depends on more space.
        self._try(self._journal.append, Phase.COMMIT, "released", durable=True, downtime_ms=round(report.downtime_ms, 1))
        context.source.call("kill")
        self._end(Phase.COMMIT, started, {"dump_stats": context.source.call("done")["stats"]})
        started = self._begin(Phase.FINISH)
        # It runs on the target: what could not be cleared up is reported, and does not hide that.
        finished, errors = steps.finish(context, reopen)
        report.undo_errors += errors
        self._end(Phase.FINISH, started, finished)
        details = report.details
        shipped = [*details[Phase.PRECOPY]["passes"], details[Phase.FREEZE]["pages"], details[Phase.SHIP]]
        report.wire_bytes = max(s["wire_bytes"] for s in shipped) + context.target.wire_bytes
