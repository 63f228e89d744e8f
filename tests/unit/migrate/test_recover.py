"""The table of recovery: complete, and true to its laws in every row."""

from __future__ import annotations

from itertools import product

import pytest

from migrate import durable
from migrate.recover import OUTCOMES, TABLE, Action, Decision, Source, Target, advice, decide, on_target, overrule

ROWS = list(product(Decision, Source, Target))
NOT_RUN = {Target.ABSENT, Target.IMAGES, Target.HELD}
RAN = {Target.RUNNING, Target.ENDED, Target.CRASHED}
LETS_SOURCE_RUN = {Action.ROLL_BACK, Action.ROLL_BACK_HERE}
LETS_TARGET_RUN = {Action.RELEASE, Action.RESTORE_AGAIN}


def test_it_is_complete() -> None:
    assert set(TABLE) == set(ROWS) and set(OUTCOMES) == set(Action)


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_laws(row: tuple[Decision, Source, Target]) -> None:
    decision, source, target = row
    action = decide(*row)
    if action in LETS_TARGET_RUN:
        assert decision == Decision.COMMIT, "the target never runs without the decision"
        assert source != Source.RUNNING and target in (Target.HELD, Target.IMAGES), "never twice"
    if action in LETS_SOURCE_RUN:
        assert target not in RAN, "the source never runs on after the target has run"
        assert decision == Decision.NONE or target in NOT_RUN, "decided: only when it is certain that the target does not run"
    if action == Action.FINISH:
        assert target in RAN and source != Source.RUNNING, (
            "what is killed on the source is no running copy, and there was another"
        )
    if action == Action.RESTORE_AGAIN:
        assert source == Source.GONE, "as long as there is a frozen copy, that one is the surer"
    if target == Target.UNREACHABLE and decision == Decision.COMMIT:
        assert action == Action.DOUBT
    if source == Source.RUNNING and target == Target.RUNNING:
        assert OUTCOMES[action] == "SPLIT_BRAIN"
    if source == Source.FROZEN and target in NOT_RUN:
        assert action in LETS_SOURCE_RUN | LETS_TARGET_RUN, "never nowhere: one of the two runs"
    if source == Source.GONE and target in (Target.HELD, Target.IMAGES):
        assert action != Action.ROLL_BACK or (decision, target) == (Decision.NONE, Target.IMAGES), (
            "the only copy is not thrown away"
        )


@pytest.mark.parametrize(
    ("row", "action"),
    [
        # What the design says, row by row; where a row here says more, docs/ARCHITECTURE.md says why.
        (("none", "frozen", "absent"), "roll-back"),
        (("none", "frozen", "images"), "roll-back"),
        (("none", "frozen", "held"), "roll-back"),
        (("none", "running", "absent"), "roll-back"),
        (("none", "running", "images"), "roll-back"),
        (("none", "running", "held"), "roll-back"),
        (("none", "frozen", "unreachable"), "roll-back-here"),
        (("none", "running", "running"), "split-brain"),
        (("commit", "frozen", "held"), "release"),
        (("commit", "frozen", "running"), "finish"),
        (("commit", "gone", "held"), "release"),
        (("commit", "gone", "running"), "finish"),
        (("commit", "gone", "images"), "restore-again"),
        (("commit", "gone", "absent"), "doubt"),
        (("commit", "frozen", "absent"), "roll-back"),
        (("commit", "running", "running"), "freeze-source"),
        (("commit", "frozen", "unreachable"), "doubt"),
        (("commit", "gone", "unreachable"), "doubt"),
    ],
)
def test_the_design(row: tuple[str, str, str], action: str) -> None:
    assert decide(Decision(row[0]), Source(row[1]), Target(row[2])) == action


@pytest.mark.parametrize(("source", "target"), list(product(Source, Target)), ids="-".join)
def test_a_damaged_decision_is_taken_for_neither(source: Source, target: Target) -> None:
    """What is done is what either word asks for, or it is safe without knowing: both copies stand still, or nothing is touched."""
    action = decide(Decision.DAMAGED, source, target)
    words = {decide(d, source, target) for d in (Decision.NONE, Decision.COMMIT)}
    still = (source, target) == (Source.FROZEN, Target.HELD)
    assert words == {action} or still or action in (Action.DOUBT, Action.SPLIT_BRAIN)


WORDS = [None, durable.UNDECIDED, durable.RELEASED, durable.RAN, "", "releaseD", "undecidee"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("status", [None, "created", "running", "paused", "stopped"])
def test_what_a_target_has(status: str | None, word: str | None) -> None:
    """What was not released there is never taken for something that ran, nor the other way round."""
    for same_boot, prepared in product((True, False), repeat=2):
        found = on_target(status, word, same_boot, prepared)
        if word in (durable.RELEASED, durable.RAN):
            assert found is not None and found not in (Target.ABSENT, Target.IMAGES)
            assert found != Target.ENDED or (word == durable.RAN and same_boot), "gone, and not known to have run"
        elif word in (None, durable.UNDECIDED):
            assert found not in (Target.ENDED, Target.CRASHED)
            assert found != Target.RUNNING or same_boot, "what was held did not outlive its host"
        else:
            assert found == (Target.RUNNING if status == "running" else None), "a damaged word tells nothing"
        if status == "running":
            assert found in (Target.RUNNING, None)
        if found == Target.HELD:
            assert status == "paused"


@pytest.mark.parametrize("word", ["source", "target", "nowhere"])
@pytest.mark.parametrize(("source", "target"), list(product(Source, Target)), ids="-".join)
def test_what_is_seen_is_not_overruled(word: str, source: Source, target: Target) -> None:
    action = overrule(word, source, target)
    if action in LETS_SOURCE_RUN:
        assert target not in (Target.RUNNING, Target.ENDED)
    if action in LETS_TARGET_RUN:
        assert source != Source.RUNNING
    if word == "nowhere":
        assert action in (None, Action.ROLL_BACK, Action.ROLL_BACK_HERE) and (action is None or source == Source.GONE)


def test_every_doubt_says_what_to_type() -> None:
    for (_, source, target), action in TABLE.items():
        if action in (Action.DOUBT, Action.SPLIT_BRAIN, Action.FREEZE_SOURCE):
            words = advice("ID", "c", "host1", "host2", source, target)
            assert "migrate recover ID" in words or "migrate abort ID" in words


def test_every_doubt_can_be_settled_by_a_person() -> None:
    """Where one copy at most is there, one of the words ends it; where two may be, one is deleted by hand first."""
    for (_, source, target), action in TABLE.items():
        if action == Action.DOUBT and source != Source.RUNNING:
            assert any(overrule(w, source, target) for w in ("source", "target", "nowhere")), (source, target)
