"""Look at both hosts of a move that was left behind, and do what migrate/recover.py says.

New agents take the move over on both hosts. Each has the container's lock there, which the kernel gives it when all that the old
ones had started is gone; only a target that is prepared waits, and is told the verdict. So nothing of the move acts but we, and
what is seen stays true.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from migrate import recover
from migrate.commit import Log
from migrate.errors import Busy, ConnectionLost, Locked, MigrateError, Outcome, ProtocolError
from migrate.recover import Action, Decision, Source, Target
from migrate.session import Place, Session
from migrate.timeline import Timeline

_AGAIN_S = 0.5


@dataclass(slots=True)
class Resolution:
    """How a move ended after all. `settled` is False while something is left to do; `words` say what, and what to type."""

    outcome: Outcome
    settled: bool
    action: Action
    source: Source
    target: Target
    words: str = ""
    errors: list[str] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Resolver:
    """Units: `wait_s` is how long what is still ending may take, `patience_s` how long an unreachable target is tried again.

    `run_on` is a person's word: source, target, nowhere, or "" for none.
    """

    migration_id: str
    source: Place
    target: Place
    remote_command: str
    coordinator: str
    wait_s: float = 60.0
    patience_s: float = 0.0
    run_on: str = ""
    # The coordinator of the move itself knows that nobody has released by hand what it did not release: the source need not wait.
    thaw_at_once: bool = False
    was_released: bool = False
    on_line: Callable[[str], None] = lambda line: None

    def run(self, make_report: Callable[[Resolution], dict[str, Any]]) -> Resolution:
        """Resolve the move, and write its report on the source. Raises: MigrateError; then all is as it was."""
        source = self.source.open(self.remote_command)
        try:
            found = source.call(
                "source_take_over", migration_id=self.migration_id, coordinator=self.coordinator, wait_s=self.wait_s
            )
            resolution = _Work(self, source, found).resolve()
            left = list(resolution.errors)
            try:
                source.call(
                    "ended",
                    outcome=str(resolution.outcome),
                    settled=resolution.settled,
                    fields={"action": str(resolution.action), "words": resolution.words, "left": left},
                    report=make_report(resolution),
                )
            except MigrateError as e:
                # On a full disk it is over all the same; another failure is found again by the next recovery.
                resolution.errors.append(str(e))
            with contextlib.suppress(MigrateError):
                source.call("leave")
            return resolution
        finally:
            source.close()


class _Work:
    def __init__(self, resolver: Resolver, source: Session, found: dict[str, Any]) -> None:
        self._r, self._source = resolver, source
        self._plan: dict[str, Any] = found["plan"]
        self._container = str(self._plan["container"])
        self._target_name = str(self._plan["target"])
        self._source_name = str(self._plan.get("source", self._r.source.name))
        try:
            self._decision = Decision(found["decision"])
            self._state = Source(found["state"])
        except ValueError as e:
            raise ProtocolError(f"{source.name} sent a state that is none: {e}") from e
        self._was_released = resolver.was_released or bool(found.get("was_released"))
        self._ran_on = bool(found.get("ran_on"))
        self._log = Log(source, Timeline(time.monotonic()))
        self._errors: list[str] = []

    def resolve(self) -> Resolution:
        if self._decision == Decision.NONE and self._r.thaw_at_once:
            self._thaw()
        target: Session | None = None
        deadline = time.monotonic() + self._r.patience_s
        try:
            while True:
                target, state = self._look_at_target()
                action = self._decide(state)
                if action != Action.DOUBT or state != Target.UNREACHABLE or time.monotonic() > deadline:
                    break
                time.sleep(_AGAIN_S)
            self._say(f"{self._container} is {self._state} on {self._source_name}, {state} on {self._target_name}: {action}")
            self._note("looked", decision=self._decision, source=self._state, target=state, action=action)
            settled, words = self._act(action, state, target)
            self._note("result", settled=settled, errors=self._errors)
        finally:
            if target is not None:
                target.close()
        outcome = recover.OUTCOMES[action]
        return Resolution(outcome, settled, action, self._state, state, words, self._errors, self._plan)

    def _say(self, line: str) -> None:
        self._r.on_line(line)

    def _note(self, mark: str, **fields: Any) -> None:
        """Journal what is done. What is right does not depend on space for it."""
        try:
            self._log.append("recover", mark, sync=False, **fields)
        except ConnectionLost:
            raise
        except MigrateError as e:
            self._errors.append(str(e))

    def _decide(self, state: Target) -> Action:
        source = self._state
        if self._ran_on and source == Source.GONE:
            source = Source.RUNNING  # it was let go of for good: what has become of it since is its own affair
        action = recover.decide(self._decision, source, state)
        if self._r.run_on and action == Action.DOUBT:
            action = recover.overrule(self._r.run_on, source, state) or action
        return action

    def _look_at_target(self) -> tuple[Session | None, Target]:
        """Raises: Locked when the move's agent on the target has not ended yet; MigrateError."""
        session: Session | None = None
        try:
            session = self._r.target.open(self._r.remote_command)
            answer = session.call(
                "target_take_over",
                migration_id=self._r.migration_id,
                container=self._container,
                coordinator=self._r.coordinator,
                wait_s=self._r.wait_s,
            )
            state = Target(answer["state"])
            if state == Target.ABSENT and not answer["known"] and self._decision != Decision.NONE:
                # What was prepared was noted there, and what was undone is, too.
                raise MigrateError(f"it knows nothing of {self._r.migration_id}: is it the host that this move went to?")
            return session, state
        except (Locked, Busy, ProtocolError):
            if session is not None:
                session.close()
            raise
        except MigrateError as e:
            if session is not None:
                session.close()
            self._say(f"{self._target_name} cannot be asked: {e}")
            return None, Target.RUNNING if self._was_released else Target.UNREACHABLE

    def _act(self, action: Action, state: Target, target: Session | None) -> tuple[bool, str]:
        """Do it; return whether nothing is left to do, and what to say. Raises: MigrateError when it could not be done."""
        if action in (Action.ROLL_BACK, Action.ROLL_BACK_HERE):
            return self._roll_back(target)
        if action in (Action.RELEASE, Action.RESTORE_AGAIN):
            assert target is not None
            return self._release(action, target)
        if action == Action.FINISH:
            return self._finish(state, target)
        if action == Action.FREEZE_SOURCE:
            self._source.call("freeze_now")
        return False, recover.advice(
            self._r.migration_id, self._container, self._source_name, self._target_name, self._state, state
        )

    def _thaw(self) -> None:
        if self._decision != Decision.NONE:
            self._source.call("revoke")
            self._decision = Decision.NONE
        self._source.call("thaw")
        self._state = Source(self._source.call("look")["state"])

    def _roll_back(self, target: Session | None) -> tuple[bool, str]:
        if self._decision != Decision.NONE and target is not None:
            # What could be released by a decision goes before the decision does.
            target.call("verdict", word="abort")
            self._thaw()
            return True, self._rolled_back()
        self._thaw()
        if target is None:
            return False, (
                f"{self._rolled_back()}; what it left on {self._target_name} goes when that can be reached: "
                f"migrate recover {self._r.migration_id}"
            )
        try:
            target.call("verdict", word="abort")
        except MigrateError as e:
            self._errors.append(f"{self._target_name}: {e}")
            return (
                False,
                f"{self._rolled_back()}; something is left on {self._target_name}: migrate recover {self._r.migration_id}",
            )
        return True, self._rolled_back()

    def _rolled_back(self) -> str:
        if self._state == Source.GONE:
            return f"{self._container} does not run on {self._source_name} any more, and never ran on {self._target_name}"
        return f"{self._container} runs on {self._source_name}"

    def _release(self, action: Action, target: Session) -> tuple[bool, str]:
        if self._decision != Decision.COMMIT:
            self._source.call("decide")
            self._decision = Decision.COMMIT
        if action == Action.RELEASE:
            target.call("verdict", word="commit")
        else:
            target.call("restore_again", flags=list(self._plan.get("criu_flags") or ()))
        self._note("released")
        return self._finish(Target.RUNNING, target)

    def _finish(self, state: Target, target: Session | None) -> tuple[bool, str]:
        if self._decision != Decision.COMMIT:
            self._source.call("decide")  # it runs there: that is the decision, whoever made it
        keep = bool(self._plan.get("keep_source"))
        settled = True
        if target is None or state == Target.CRASHED:
            keep = True
            settled = target is not None
        else:
            try:
                target.call("settle")
            except MigrateError as e:
                self._errors.append(f"{self._target_name}: its files are not known to be on disk: {e}")
                keep, settled = True, False
        try:
            self._source.call("forget", keep_bundle=keep)
        except ConnectionLost:
            raise
        except MigrateError as e:
            self._errors.append(str(e))
            settled = False
        if settled and target is not None:
            try:
                target.call("confirm")
            except MigrateError as e:
                # It may have images still, and its record is open.
                self._errors.append(f"{self._target_name}: {e}")
                settled = False
        words = f"{self._container} runs on {self._target_name}"
        if state in (Target.ENDED, Target.CRASHED):
            why = "has ended there" if state == Target.ENDED else "ended when that went down"
            words = f"{self._container} was released on {self._target_name}, and {why}"
            if keep:
                words += f"; its files are on {self._source_name}, too"
        if not settled:
            words += f"; something is left to do: migrate recover {self._r.migration_id}"
        return settled, words
