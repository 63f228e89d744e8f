"""When to stop copying memory that goes on changing, and freeze. Pure.

After each pass the downtime is predicted: what was written to meanwhile, over the rate at which memory travels, plus what a
freeze costs anyway. Passes go on while that is more than was asked for, and still falls. When it does not fall any more, a
policy decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_PASSES = 60
# How much of the CPU time that it took a container is left, step by step. Units: per cent.
ALLOWANCES = (75, 50, 35, 20, 10, 5)
# Of passes smaller than this the time says nothing about the link.
_TELLING_BYTES = 1 << 20
_COMPARABLE = 4
# Falls by less than this, twice in a row, are no falls.
_FALLING = 0.9
# A freeze in which memory takes less than this is as short as one can be. Units: milliseconds.
_NOTHING_MS = 10.0


class Diverge(StrEnum):
    """What to do when the allowed downtime cannot be kept."""

    SWITCH = "switch"  # freeze all the same
    THROTTLE = "throttle"  # slow the container down, and go on; freeze when even that does not help
    LAZY = "lazy"  # freeze, and send what is left when it runs on the target already
    ABORT = "abort"  # leave it where it is


class Next(StrEnum):
    AGAIN = "again"
    THROTTLE = "throttle"
    FREEZE = "freeze"
    LAZY = "lazy"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the memory.

    Units: bytes of memory; seconds from its begin to its end, and from the begin of the one before, None for the first one;
    bytes a second that the way carries without a bandwidth limit, None where that is what the pass itself tells.
    """

    sent_bytes: int
    seconds: float
    since_s: float | None = None
    link_rate: float | None = None

    @property
    def rate(self) -> float:
        return self.link_rate or self.sent_bytes / max(self.seconds, 1e-6)


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

    `allowance` is what the container is left of its CPU time. What was seen before `since` passes had been made is not
    compared with: it was another time, or another speed.
    """
    memory_ms, remaining, rate = _predict(passes)
    predicted_ms = limits.fixed_ms + memory_ms

    def verdict(next_: Next, reason: str, allowed: int = allowance) -> Verdict:
        return Verdict(next_, reason, round(predicted_ms, 1), remaining, rate, allowed)

    if predicted_ms <= limits.max_downtime_ms:
        allowed_ms = limits.max_downtime_ms
        return verdict(Next.FREEZE, f"a downtime of {predicted_ms:.0f} ms is predicted, and {allowed_ms:.0f} ms are allowed")
    if memory_ms <= _NOTHING_MS:
        # To slow it down would change nothing.
        last = Next.ABORT if limits.policy == Diverge.ABORT else Next.FREEZE
        return verdict(last, f"next to nothing is left to send, and {predicted_ms:.0f} ms are predicted all the same")
    # The first pass says how fast memory travels, and nothing of how fast it changes: that is known after the next.
    told = [_predict(passes[: i + 1])[0] for i in range(since, len(passes)) if i]
    falls = len(told) < 3 or any(late <= early * _FALLING for early, late in zip(told[-3:], told[-2:], strict=False))
    many = len(passes) >= MAX_PASSES
    if falls and not many:
        return verdict(Next.AGAIN, "")
    why = f"memory changes as fast as it is sent: {predicted_ms:.0f} ms are predicted, and it does not get less"
    if falls:
        why = f"after {MAX_PASSES} passes {predicted_ms:.0f} ms are predicted still"
    if limits.policy == Diverge.ABORT:
        return verdict(Next.ABORT, why)
    less = [a for a in ALLOWANCES if a < allowance]
    if limits.policy == Diverge.THROTTLE and less and not many:
        return verdict(Next.THROTTLE, f"{why}: it is left {less[0]} % of its CPU time", less[0])
    if limits.policy == Diverge.LAZY:
        return verdict(Next.LAZY, f"{why}: what is left is sent when it runs there")
    return verdict(Next.FREEZE, why)


def _predict(passes: Sequence[Pass]) -> tuple[float, int, float]:
    """Return how long it would take to send what a freeze would find changed, how much that is, and the rate.

    Units: milliseconds, bytes, bytes a second.
    """
    telling = [p for p in passes if p.sent_bytes >= _TELLING_BYTES and p.seconds > 0]
    last = passes[-1]
    if not telling:
        return 0.0, last.sent_bytes, 0.0
    rate = telling[-1].rate
    remaining = last.sent_bytes
    if last.since_s is not None and last.since_s <= _COMPARABLE * last.seconds:
        # What this pass sent was written to since the one before it began. Of a much longer time that says little: it may be
        # a few pages that are written to all the time.
        remaining = min(int(last.sent_bytes / max(last.since_s, 1e-6) * last.seconds), last.sent_bytes)
    return remaining / rate * 1000, remaining, rate


def fixed_ms(told: dict[str, Any]) -> float | None:
    """Return what a freeze cost besides its memory, in milliseconds, by the report of a move; None where it does not tell."""
    try:
        last = told["iterations"][-1]
        memory_ms = last["remaining_bytes"] / last["rate"] * 1000 if last["rate"] else 0.0
        found = max(float(told["downtime_ms"]) - memory_ms, 0.0)
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError):
        return None
    return found if math.isfinite(found) else None
