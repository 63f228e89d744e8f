"""The decision, and what follows it: the only place from which there is no way back.

    decision on the source's disk --> release the target (downtime ends) --> kill the source

Before the decision every failure is undone. After it, only forward: when the target's answer is lost, it is asked
again over a new connection; when that gives no answer either, the source stays frozen and the outcome is IN_DOUBT.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from migrate.errors import ConnectionLost, MigrateError
from migrate.session import Session

_ASK_AGAIN_S = 30.0


class InDoubt(MigrateError):
    """Decided, but whether the target runs is not known."""

    code = "in-doubt"


def release_target(target: Session, reopen: Callable[[], Session], container: str) -> None:
    """Let the target run.

    Raises: InDoubt, with the source still frozen.
    """
    try:
        target.call("release")
        return
    except ConnectionLost as e:
        lost: MigrateError = e
    except MigrateError as e:
        raise InDoubt(f"the target could not release {container}: {e}", hint=_hint(container, target.name)) from e
    deadline = time.monotonic() + _ASK_AGAIN_S
    while time.monotonic() < deadline:
        try:
            again = reopen()
        except MigrateError:
            time.sleep(1)
            continue
        try:
            state = again.call("status", container=container)["state"]
        except MigrateError:
            time.sleep(1)
            continue
        finally:
            again.close()
        if state is not None and state["status"] == "running":
            return
        time.sleep(0.5)
    raise InDoubt(
        f"the connection to {target.name} broke after the decision, and whether {container} runs there is not known: {lost}",
        hint=_hint(container, target.name),
    )


def _hint(container: str, target: str) -> str:
    return (
        f"on {target}: runtime state {container}. When it runs there: runtime delete --force {container} here. "
        f"When it does not: runtime delete --force {container} there, then runtime resume {container} here"
    )
