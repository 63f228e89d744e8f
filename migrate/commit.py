"""The decision, and what follows it: the only place from which there is no way back.

    decision on the source's disk --> release the target (downtime ends) --> kill the source

Before the decision every failure is undone. From the moment in which it is asked for, a failure means to look at both hosts and
at the source's disk, and to do what migrate/recover.py says: the source stays frozen until it is known what the target did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from migrate import faults
from migrate.errors import MigrateError
from migrate.phase import Phase
from migrate.session import Session
from migrate.timeline import Timeline

_BATCHES = 16  # as much as the kernel keeps


class Log:
    """Appends to the journal on the source. Tests strike around each entry, and nowhere else."""

    def __init__(self, source: Session, timeline: Timeline) -> None:
        self._source, self._timeline = source, timeline

    def append(self, phase: str, mark: str, *, sync: bool = False, **fields: Any) -> None:
        """Write one entry; with `sync` it is on disk when this returns. Raises: MigrateError."""
        with faults.around(f"{phase}.{mark}"), self._timeline.span(f"journal: {phase} {mark}", "source"):
            self._source.call("journal", phase=phase, mark=mark, sync=sync, fields=fields)


def commit(
    source: Session,
    target: Session,
    log: Log,
    timeline: Timeline,
    on_asked: Callable[[], None],
    on_released: Callable[[], None],
    on_served: Callable[[], None],
    later: bool = False,
) -> dict[str, Any]:
    """Decide, release, kill; the last when all memory is there, if some of it comes `later`.

    Returns CRIU's statistics of the dump, how many frames that came meanwhile were handed on, and how much memory came later.

    `on_asked` is called when the decision is about to be asked for, `on_released` when the target runs, `on_served` when the
    memory that comes later is there.

    Raises: MigrateError; after `on_asked` what was done is not known.
    """
    log.append(Phase.COMMIT, "intent")
    with timeline.span("is it there still", "target"):
        target.call("ping")  # decided with a target that cannot be reached, the source would stand still until it can
    on_asked()
    with timeline.span("decide, on disk", "source"):
        kept = source.call("decide")
    log.append(Phase.COMMIT, "decided")
    with timeline.span("release, on disk; it runs", "target"):
        handed_on = _count(target.call("release", frames=kept["frames"]))
    on_released()
    log.append(Phase.COMMIT, "released", sync=True, **({"later": True} if later else {}))
    if kept["kept"] is True:
        with timeline.span("hand on what came for it", "source"), contextlib.suppress(MigrateError):
            handed_on += _hand_on(source, target)
    if later:
        with timeline.span("send the rest of the memory", "source"):
            rest = source.call("served")
        on_served()
        log.append(Phase.COMMIT, "served", sync=True)
    source.call("kill")
    return {"dump_stats": source.call("killed")["stats"], "frames": handed_on, **({"later": rest} if later else {})}


def _hand_on(source: Session, target: Session) -> int:
    """Hand on what came after the decision, until its neighbours knew where it is. Should that fail, it is sent again."""
    handed_on = 0
    for _ in range(_BATCHES):
        frames = source.call("frames")["frames"]
        if not frames:
            break
        handed_on += _count(target.call("deliver", frames=frames))
    return handed_on


def _count(answer: dict[str, Any]) -> int:
    return answer["frames"] if type(answer.get("frames")) is int else 0
