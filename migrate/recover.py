"""What becomes of a move that was left behind: decision x source x target -> action. Pure, and complete.

The laws behind the table:

* The target never runs without the decision on the source's disk, so without one the source may run on.
* With the decision, the source runs on only when it is certain that the target has never run and never will.
* What is not certain is left to stand still, and said.
"""

from __future__ import annotations

from enum import StrEnum

from migrate import durable
from migrate.errors import Outcome


class Decision(StrEnum):
    NONE = "none"
    COMMIT = "commit"
    DAMAGED = "damaged"  # a word that is none of those that are ever written: it may have been either


class Source(StrEnum):
    """The container on the source, when nothing of the move is alive there."""

    RUNNING = "running"
    FROZEN = "frozen"
    GONE = "gone"


class Target(StrEnum):
    """What the move has made on the target, when nothing of it is alive there but what waits for the decision."""

    ABSENT = "absent"  # nothing that ever ran, or could: files at most
    IMAGES = "images"  # the whole checkpoint, and nobody who would restore it
    HELD = "held"  # restored, and not released
    RUNNING = "running"
    ENDED = "ended"  # released: it ran, and is no longer there
    CRASHED = "crashed"  # released, and gone: its host went down, or it is not known whether it ran at all
    UNREACHABLE = "unreachable"


class Action(StrEnum):
    ROLL_BACK = "roll-back"  # discard the target's part, take a decision back, let the source run
    ROLL_BACK_HERE = "roll-back-here"  # the same, but the target's part is left for later
    RELEASE = "release"  # release the target, then kill the source
    RESTORE_AGAIN = "restore-again"  # the target's images are the only copy: restore them, and let it run
    FINISH = "finish"  # it runs there, or has run: kill what is left on the source
    FREEZE_SOURCE = "freeze-source"  # two copies run: stop this one, where it is
    SPLIT_BRAIN = "split-brain"  # two copies run, and it is not known which one is right: touch nothing
    DOUBT = "doubt"  # touch nothing, say what to type


_N, _C = Decision.NONE, Decision.COMMIT
_R, _F, _G = Source.RUNNING, Source.FROZEN, Source.GONE
_T = Target
_A = Action

TABLE: dict[tuple[Decision, Source, Target], Action] = {
    (_N, _R, _T.ABSENT): _A.ROLL_BACK,
    (_N, _R, _T.IMAGES): _A.ROLL_BACK,
    (_N, _R, _T.HELD): _A.ROLL_BACK,
    (_N, _R, _T.RUNNING): _A.SPLIT_BRAIN,
    (_N, _R, _T.ENDED): _A.SPLIT_BRAIN,
    (_N, _R, _T.CRASHED): _A.SPLIT_BRAIN,
    (_N, _R, _T.UNREACHABLE): _A.ROLL_BACK_HERE,
    (_N, _F, _T.ABSENT): _A.ROLL_BACK,
    (_N, _F, _T.IMAGES): _A.ROLL_BACK,
    (_N, _F, _T.HELD): _A.ROLL_BACK,
    # It cannot have been released without a decision: somebody did it by hand.
    (_N, _F, _T.RUNNING): _A.DOUBT,
    (_N, _F, _T.ENDED): _A.DOUBT,
    (_N, _F, _T.CRASHED): _A.DOUBT,
    (_N, _F, _T.UNREACHABLE): _A.ROLL_BACK_HERE,
    (_N, _G, _T.ABSENT): _A.ROLL_BACK,
    (_N, _G, _T.IMAGES): _A.ROLL_BACK,
    # The only copy. It may have run on at the source after the dump, and ended there: only people know.
    (_N, _G, _T.HELD): _A.DOUBT,
    (_N, _G, _T.RUNNING): _A.FINISH,
    (_N, _G, _T.ENDED): _A.FINISH,
    (_N, _G, _T.CRASHED): _A.FINISH,
    # It may hold the only copy.
    (_N, _G, _T.UNREACHABLE): _A.DOUBT,
    # Somebody let the source run by hand; what is not released there never will be.
    (_C, _R, _T.ABSENT): _A.ROLL_BACK,
    (_C, _R, _T.IMAGES): _A.ROLL_BACK,
    (_C, _R, _T.HELD): _A.ROLL_BACK,
    (_C, _R, _T.RUNNING): _A.FREEZE_SOURCE,
    (_C, _R, _T.ENDED): _A.SPLIT_BRAIN,
    (_C, _R, _T.CRASHED): _A.SPLIT_BRAIN,
    (_C, _R, _T.UNREACHABLE): _A.DOUBT,
    # Nothing there ever ran, and all that could have made it run is gone: it runs on here at once.
    (_C, _F, _T.ABSENT): _A.ROLL_BACK,
    (_C, _F, _T.IMAGES): _A.ROLL_BACK,
    (_C, _F, _T.HELD): _A.RELEASE,
    (_C, _F, _T.RUNNING): _A.FINISH,
    (_C, _F, _T.ENDED): _A.FINISH,
    # It ran there for a moment that nobody knows the length of. To run on from before it is for people to decide.
    (_C, _F, _T.CRASHED): _A.DOUBT,
    (_C, _F, _T.UNREACHABLE): _A.DOUBT,
    (_C, _G, _T.ABSENT): _A.DOUBT,
    (_C, _G, _T.IMAGES): _A.RESTORE_AGAIN,
    (_C, _G, _T.HELD): _A.RELEASE,
    (_C, _G, _T.RUNNING): _A.FINISH,
    (_C, _G, _T.ENDED): _A.FINISH,
    (_C, _G, _T.CRASHED): _A.FINISH,
    (_C, _G, _T.UNREACHABLE): _A.DOUBT,
}


def _of_either(source: Source, target: Target) -> Action:
    """Return what is right whichever of the two a damaged word was."""
    without, decided = TABLE[_N, source, target], TABLE[_C, source, target]
    if without == decided:
        return without
    if source == Source.FROZEN and target == Target.HELD:
        return Action.ROLL_BACK  # neither copy runs, and what is held there is ended first
    return Action.SPLIT_BRAIN if (source, target) == (Source.RUNNING, Target.RUNNING) else Action.DOUBT


TABLE.update({(Decision.DAMAGED, source, target): _of_either(source, target) for source in Source for target in Target})

OUTCOMES: dict[Action, Outcome] = {
    Action.ROLL_BACK: Outcome.ROLLED_BACK,
    Action.ROLL_BACK_HERE: Outcome.ROLLED_BACK,
    Action.RELEASE: Outcome.COMPLETED,
    Action.RESTORE_AGAIN: Outcome.COMPLETED,
    Action.FINISH: Outcome.COMPLETED,
    Action.FREEZE_SOURCE: Outcome.SPLIT_BRAIN,
    Action.SPLIT_BRAIN: Outcome.SPLIT_BRAIN,
    Action.DOUBT: Outcome.IN_DOUBT,
}


def decide(decision: Decision, source: Source, target: Target) -> Action:
    """Return what to do. Never raises: the table is complete."""
    return TABLE[decision, source, target]


def on_target(status: str | None, word: str | None, same_boot: bool, prepared: bool) -> Target | None:
    """Return what a move has on its target when nothing of it is alive there; None when that cannot be known.

    `status` is the container's, None where there is none of the move's bundle; `word` is what `released` says; `same_boot`
    whether the host has been up since the move began there; `prepared` whether the whole checkpoint is there. Never UNREACHABLE.
    """
    not_released = word in (None, durable.UNDECIDED)
    if status == "running":
        # In another boot nothing that was held is left: somebody has started it anew.
        return None if not_released and not same_boot else Target.RUNNING
    if not not_released and word not in (durable.RELEASED, durable.RAN):
        return None
    if status == "paused":
        # Once it ran, it was somebody else who paused it.
        return Target.RUNNING if word == durable.RAN else Target.HELD
    if not_released:
        return Target.IMAGES if prepared else Target.ABSENT
    # That it ran is written after it did, and survives all but the end of the host itself.
    return Target.ENDED if word == durable.RAN and same_boot else Target.CRASHED


def overrule(run_on: str, source: Source, target: Target) -> Action | None:
    """Return what a person's word, source, target or nowhere, makes of a doubt; None when it cannot be.

    Their word is about what we cannot see; what we do see is not overruled: what runs there is not doubled.
    """
    if run_on == "source":
        if source == Source.FROZEN and target in (Target.ABSENT, Target.IMAGES, Target.HELD, Target.CRASHED):
            return Action.ROLL_BACK
        if source == Source.FROZEN and target == Target.UNREACHABLE:
            return Action.ROLL_BACK_HERE
        return None
    if run_on == "nowhere":
        if source == Source.GONE and target == Target.UNREACHABLE:
            return Action.ROLL_BACK_HERE
        return Action.ROLL_BACK if source == Source.GONE and target in (Target.ABSENT, Target.HELD) else None
    if source == Source.RUNNING:
        return None
    return {
        Target.HELD: Action.RELEASE,
        Target.IMAGES: Action.RESTORE_AGAIN,
        Target.RUNNING: Action.FINISH,
        Target.ENDED: Action.FINISH,
        Target.CRASHED: Action.FINISH,
    }.get(target)


def advice(migration_id: str, container: str, source_name: str, target_name: str, source: Source, target: Target) -> str:
    """Say what a person can look at, and type, when nothing is certain."""
    recover = f"migrate recover {migration_id}"
    if source == Source.GONE and target == Target.UNREACHABLE:
        return (
            f"when {target_name} is back: {recover}. When it is lost for good, no copy is left, only the files on {source_name}: "
            f"{recover} --run-on nowhere"
        )
    if target == Target.UNREACHABLE:
        return (
            f"when {target_name} is back: {recover}. When it is lost for good, and {container} does not run there: "
            f"{recover} --run-on source"
        )
    if source == Source.GONE and target == Target.HELD:
        return (
            f"{target_name} holds the only copy. When {container} did not run on after this move on {source_name}: "
            f"{recover} --run-on target; otherwise: migrate abort {migration_id}"
        )
    if source == Source.GONE and target == Target.ABSENT:
        return f"no copy of its memory is left; its files are on {source_name}. To end the move: migrate abort {migration_id}"
    if source == Source.FROZEN and target == Target.CRASHED:
        return (
            f"{container} was released on {target_name}, and is gone there: that went down, or never ran it. To run on here: "
            f"{recover} --run-on source; to start it anew from its files there: {recover} --run-on target"
        )
    return f"look on both: runtime state {container}. The copy that is to go: runtime delete --force {container}; then: {recover}"
