"""When to stop copying memory that goes on changing, and freeze. Pure.

After each pass the downtime is predicted: what was written to meanwhile, over the rate at which memory travels, plus what a
freeze costs anyway. Passes go on while that is more than was asked for, and still falls. When it does not fall any more, a
policy decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

MAX_PASSES = 60
# How much of the CPU time that it took a container is left, step by step. Units: per cent.
ALLOWANCES = (75, 50, 35, 20, 10, 5)
# Of passes smaller than this the time says nothing about the link.
_TELLING_BYTES = 1 << 20
_COMPARABLE = 4
# Falls by less than this, twice in a row, are no falls.
_FALLING = 0.9


class Diverge(StrEnum):
    """What to do when the allowed downtime cannot be kept."""

    SWITCH = "switch"  # freeze all the same
    THROTTLE = "throttle"  # slow the container down, and go on; freeze when even that does not help
    ABORT = "abort"  # leave it where it is


class Next(StrEnum):
    AGAIN = "again"
    THROTTLE = "throttle"
    FREEZE = "freeze"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the memory. Units: bytes of memory; seconds from its begin to its end, and of these without sending.

    What is not done for the sake of a bandwidth limit will be, when the container stands still.
    """

    sent_bytes: int
    seconds: float
    waited_seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.sent_bytes / max(self.seconds - self.waited_seconds, 1e-6)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows a pass. Units: milliseconds; bytes; bytes a second; per cent of its CPU time that the container is left."""

    next: Next
    reason: str
    predicted_ms: float
    remaining_bytes: int
    rate: float
    allowance: int = 100


@dataclass(frozen=True, slots=True)
class Limits:
    """Units: milliseconds. `fixed_ms` is what a freeze costs when no memory is left to send."""

    max_downtime_ms: float
    fixed_ms: float
    policy: Diverge = Diverge.SWITCH


def judge(passes: Sequence[Pass], limits: Limits, allowance: int = 100, since: int = 0) -> Verdict:
    """Say what follows the last pass, and why.

    `allowance` is what the container is left of its CPU time; it was told so when `since` passes had been made.
    """
    predicted_ms, remaining, rate = _predict(passes, limits.fixed_ms)

    def verdict(next_: Next, reason: str, allowed: int = allowance) -> Verdict:
        return Verdict(next_, reason, round(predicted_ms, 1), remaining, rate, allowed)

    if predicted_ms <= limits.max_downtime_ms:
        allowed_ms = limits.max_downtime_ms
        return verdict(Next.FREEZE, f"a downtime of {predicted_ms:.0f} ms is predicted, and {allowed_ms:.0f} ms are allowed")
    # The first pass says how fast memory travels, and nothing of how fast it changes: that is known after the next. It is the
    # same with the first one after the container was slowed down.
    told = [_predict(passes[: i + 1], limits.fixed_ms)[0] for i in range(since + 1, len(passes))]
    falls = len(told) < 3 or any(late <= early * _FALLING for early, late in zip(told[-3:], told[-2:], strict=False))
    many = len(passes) >= MAX_PASSES
    if falls and not many:
        return verdict(Next.AGAIN, "")
    why = f"after {MAX_PASSES} passes {predicted_ms:.0f} ms are predicted still" if falls else (
        f"memory changes as fast as it is sent: {predicted_ms:.0f} ms are predicted, and it does not get less"
    )  # fmt: skip
    if limits.policy == Diverge.ABORT:
        return verdict(Next.ABORT, why)
    less = [a for a in ALLOWANCES if a < allowance]
    if limits.policy == Diverge.THROTTLE and less and not many:
        return verdict(Next.THROTTLE, f"{why}: it is left {less[0]} % of its CPU time", less[0])
    return verdict(Next.FREEZE, why)


def _predict(passes: Sequence[Pass], fixed_ms: float) -> tuple[float, int, float]:
    telling = [p for p in passes if p.sent_bytes >= _TELLING_BYTES and p.seconds > 0]
    last = passes[-1]
    if not telling:
        return fixed_ms, last.sent_bytes, 0.0
    rate = telling[-1].rate
    remaining = last.sent_bytes
    if len(passes) > 1 and passes[-2].seconds <= _COMPARABLE * last.seconds:
        # What this pass sent was written to during the one before it. Of a much longer time that says little: it may be
        # a few pages that are written to all the time.
        changing = last.sent_bytes / max(passes[-2].seconds, 1e-6)
        remaining = min(int(changing * last.seconds), last.sent_bytes)
    return fixed_ms + remaining / rate * 1000, remaining, rate
