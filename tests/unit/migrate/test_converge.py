"""When passes over the memory end, for links and programs of all speeds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.converge import ALLOWANCES, MAX_PASSES, Diverge, Limits, Next, Pass, Verdict, fixed_ms, judge

FIXED_MS = 100.0


def simulate(
    memory: float,
    rate: float,
    dirty: float,
    max_downtime_ms: float,
    working_set: float | None = None,
    policy: Diverge = Diverge.SWITCH,
) -> list[Verdict]:
    """Copy `memory` bytes over a link of `rate` bytes a second, while `dirty` bytes a second are written to in a working set."""
    passes: list[Pass] = []
    verdicts: list[Verdict] = []
    size = memory
    allowance, since = 100, 0
    while not verdicts or verdicts[-1].next in (Next.AGAIN, Next.THROTTLE):
        passes.append(Pass(int(size), size / rate, passes[-1].seconds if passes else None))
        verdicts.append(judge(passes, Limits(max_downtime_ms, FIXED_MS, policy), allowance, since))
        size = min(dirty * allowance / 100 * passes[-1].seconds, working_set or memory)
        if verdicts[-1].next == Next.THROTTLE:
            allowance, since = verdicts[-1].allowance, len(passes)
    return verdicts


def test_a_program_that_writes_little() -> None:
    verdicts = simulate(1 << 30, 100e6, 5e6, 300)
    assert 2 <= len(verdicts) <= 4
    assert verdicts[-1].predicted_ms <= 300 and "are allowed" in verdicts[-1].reason


def test_as_many_passes_as_the_downtime_takes() -> None:
    counts = [len(simulate(1 << 30, 100e6, 50e6, ms)) for ms in (5000, 1000, 300, 150)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize("dirty", [100e6, 200e6])
@pytest.mark.parametrize(
    ("policy", "end"), [(Diverge.SWITCH, Next.FREEZE), (Diverge.LAZY, Next.LAZY), (Diverge.ABORT, Next.ABORT)]
)
def test_a_program_that_writes_faster_than_the_link(dirty: float, policy: Diverge, end: Next) -> None:
    verdicts = simulate(1 << 30, 100e6, dirty, 300, policy=policy)
    assert len(verdicts) <= 6 and "as fast as it is sent" in verdicts[-1].reason
    assert verdicts[-1].next == end


@pytest.mark.parametrize(("dirty", "most"), [(120e6, 50), (300e6, 20), (1500e6, 5)])
def test_it_is_slowed_down_until_it_can_be_kept_up_with(dirty: float, most: int) -> None:
    verdicts = simulate(1 << 30, 100e6, dirty, 300, policy=Diverge.THROTTLE)
    assert verdicts[-1].predicted_ms <= 300, verdicts[-1]
    allowances = [v.allowance for v in verdicts if v.next == Next.THROTTLE]
    assert allowances == list(ALLOWANCES[: len(allowances)]) and allowances[-1] >= most
    assert verdicts[-1].allowance == allowances[-1]


def test_when_even_the_slowest_is_too_fast() -> None:
    verdicts = simulate(1 << 30, 100e6, 1e11, 300, policy=Diverge.THROTTLE)
    assert [v.allowance for v in verdicts if v.next == Next.THROTTLE] == list(ALLOWANCES)
    assert verdicts[-1].next == Next.FREEZE and "as fast as it is sent" in verdicts[-1].reason


def test_a_small_set_that_is_written_to_all_the_time() -> None:
    """Of 1 GiB, 64 MiB change: two passes are worth it, more are not."""
    verdicts = simulate(1 << 30, 100e6, 500e6, 300, working_set=64 << 20)
    assert 3 <= len(verdicts) <= 6
    assert verdicts[-1].predicted_ms < 900


@pytest.mark.parametrize(("policy", "end"), [(Diverge.THROTTLE, Next.FREEZE), (Diverge.ABORT, Next.ABORT)])
def test_less_than_a_freeze_costs_anyway(policy: Diverge, end: Next) -> None:
    """Nothing is gained by slowing a container down whose memory is not what takes the time."""
    verdicts = simulate(1 << 30, 100e6, 2e6, 50, policy=policy)
    assert verdicts[-1].next == end and "next to nothing is left" in verdicts[-1].reason
    assert not [v for v in verdicts if v.next == Next.THROTTLE]


def test_a_slow_fall_is_a_fall() -> None:
    """What a freeze costs anyway does not hide that there is less and less to send."""
    verdicts = simulate(1 << 30, 100e6, 80e6, 110, policy=Diverge.ABORT)
    assert verdicts[-1].next == Next.FREEZE, verdicts[-1]


def test_after_a_while() -> None:
    """What was seen some time ago is not compared with: more has changed meanwhile."""
    passes = [Pass(1 << 30, 10.0), Pass(10 << 20, 0.1, 10.0), Pass(200 << 20, 2.0, 60.0)]
    assert judge(passes, Limits(300, FIXED_MS, Diverge.ABORT), since=2).next == Next.AGAIN


def test_a_limit_does_not_hold_in_the_freeze() -> None:
    """With 10 MB a second allowed on a way that carries 100, 20 MB take 200 ms when nothing holds them up."""
    passes = [Pass(1 << 30, 107.0, None, 100e6), Pass(20_000_000, 2.0, 2.0, 100e6)]
    assert judge(passes, Limits(400, FIXED_MS)).predicted_ms == pytest.approx(300)
    assert judge([Pass(1 << 30, 107.0), Pass(20_000_000, 2.0, 2.0)], Limits(400, FIXED_MS)).predicted_ms == pytest.approx(
        2100, rel=0.01
    )


def test_next_to_nothing() -> None:
    assert judge([Pass(200 << 10, 0.01)], Limits(300, FIXED_MS)).next == Next.FREEZE


@given(
    st.floats(1e3, 1e12),
    st.floats(1e5, 1e10),
    st.floats(0, 1e11),
    st.floats(1, 1e5),
    st.floats(1e3, 1e12),
    st.sampled_from(Diverge),
)
def test_it_always_ends(
    memory: float, rate: float, dirty: float, max_downtime_ms: float, working_set: float, policy: Diverge
) -> None:
    verdicts = simulate(memory, rate, dirty, max_downtime_ms, working_set, policy)
    assert len(verdicts) <= MAX_PASSES
    assert all(bool(v.reason) == (v.next != Next.AGAIN) for v in verdicts)
    assert verdicts[-1].next in (Next.FREEZE, Next.LAZY, Next.ABORT)
    assert verdicts[-1].next != Next.LAZY or policy == Diverge.LAZY


def test_what_a_freeze_costs_is_told_by_the_moves_before() -> None:
    told = {"downtime_ms": 450.0, "iterations": [{"remaining_bytes": 10_000_000, "rate": 100_000_000.0}]}
    assert fixed_ms(told) == pytest.approx(350)
    assert fixed_ms({**told, "downtime_ms": 50.0}) == 0, "the link was faster than was thought"
    assert fixed_ms({**told, "iterations": [{"remaining_bytes": 0, "rate": 0.0}]}) == 450
    for other in ({**told, "downtime_ms": None}, {**told, "iterations": []}, {}):
        assert fixed_ms(other) is None
