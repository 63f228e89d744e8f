"""The decision, and what follows it: the only place from which there is no way back.

    decision on the source's disk --> release the target (downtime ends) --> kill the source

Before the decision every failure is undone. After it the source stays frozen until it is known what the target did.
When its answer is lost, it is asked again over a new connection. When it runs there, the move goes forward. When it
is certain that nothing of it is left there, the decision is taken back, and the source runs on. When neither can be
told, the outcome is IN_DOUBT, and the source stays frozen.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from migrate.errors import ConnectionLost, Locked, MigrateError
from migrate.session import Session

_ASK_AGAIN_S = 30.0


class InDoubt(MigrateError):
    """Decided, but whether the target runs is not known."""

    code = "in-doubt"


def release_target(target: Session, reopen: Callable[[], Session], migration_id: str, container: str) -> bool:
    """Let the target run; False when it is certain that it does not, and will not.

    Raises: InDoubt, with the source still frozen.
    """
    try:
        target.call("release")
        return True
    except ConnectionLost as e:
        lost: MigrateError = e
    except MigrateError as e:
        lost = e
    target.close()
    deadline = time.monotonic() + _ASK_AGAIN_S
    while time.monotonic() < deadline:
        try:
            answer = _ask(reopen(), migration_id, container)
        except MigrateError:
            answer = None
        if answer is not None:
            return answer
        time.sleep(0.5)
    raise InDoubt(
        f"the connection to {target.name} broke after the decision, and whether {container} runs there is not known: {lost}",
        hint=_hint(container, target.name),
    )


def _ask(again: Session, migration_id: str, container: str) -> bool | None:
    """Ask over a new connection whether the target runs; None while that is not settled.

    The lock is what settles it: it is the first agent's until that has let go of everything, and without it and
    without a container there is nothing left on the target that could run.
    """
    try:
        try:
            again.call("begin", migration_id=migration_id, container=container)
        except Locked:
            return None
        state = again.call("status", container=container)["state"]
        again.call("leave")
        if state is None:
            return False
        return True if state["status"] == "running" else None
    finally:
        again.close()


def _hint(container: str, target: str) -> str:
    return (
        f"on {target}: runtime state {container}. When it runs there: runtime delete --force {container} here. "
        f"When it does not: runtime delete --force {container} there, then runtime resume {container} here"
    )
