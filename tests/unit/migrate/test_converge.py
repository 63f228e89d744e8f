"""When passes over the memory end, for links and programs of all speeds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.converge import MAX_PASSES, Pass, Verdict, judge

FIXED_MS = 100.0


def simulate(memory: float, rate: float, dirty: float, max_downtime_ms: float, working_set: float | None = None) -> list[Verdict]:
    """Copy `memory` bytes over a link of `rate` bytes a second, while `dirty` bytes a second are written to in a working set."""
    passes: list[Pass] = []
    verdicts: list[Verdict] = []
    size = memory
    while not verdicts or verdicts[-1].go_on:
        passes.append(Pass(int(size), size / rate))
        verdicts.append(judge(passes, max_downtime_ms, FIXED_MS))
        size = min(dirty * passes[-1].seconds, working_set or memory)
    return verdicts


def test_a_program_that_writes_little() -> None:
    verdicts = simulate(1 << 30, 100e6, 5e6, 300)
    assert 2 <= len(verdicts) <= 4
    assert verdicts[-1].predicted_ms <= 300 and "are allowed" in verdicts[-1].reason


def test_as_many_passes_as_the_downtime_takes() -> None:
    counts = [len(simulate(1 << 30, 100e6, 50e6, ms)) for ms in (5000, 1000, 300, 150)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize("dirty", [100e6, 200e6])
def test_a_program_that_writes_faster_than_the_link(dirty: float) -> None:
    verdicts = simulate(1 << 30, 100e6, dirty, 300)
    assert len(verdicts) <= 6 and "as fast as it is sent" in verdicts[-1].reason


def test_a_small_set_that_is_written_to_all_the_time() -> None:
    """Of 1 GiB, 64 MiB change: two passes are worth it, more are not."""
    verdicts = simulate(1 << 30, 100e6, 500e6, 300, working_set=64 << 20)
    assert 3 <= len(verdicts) <= 6
    assert verdicts[-1].predicted_ms < 900


def test_next_to_nothing() -> None:
    assert not judge([Pass(200 << 10, 0.01)], 300, FIXED_MS).go_on


@given(st.floats(1e3, 1e12), st.floats(1e5, 1e10), st.floats(0, 1e11), st.floats(1, 1e5), st.floats(1e3, 1e12))
def test_it_always_ends(memory: float, rate: float, dirty: float, max_downtime_ms: float, working_set: float) -> None:
    verdicts = simulate(memory, rate, dirty, max_downtime_ms, working_set)
    assert len(verdicts) <= MAX_PASSES
    assert all(v.reason == "" for v in verdicts[:-1]) and verdicts[-1].reason
