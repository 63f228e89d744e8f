"""When to stop copying memory that goes on changing, and freeze. Pure.

After each pass the downtime is predicted: what was written to meanwhile, over the rate at which memory travels, plus what a
freeze costs anyway. Passes go on while that is more than was asked for, and still falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PASSES = 30
# Of passes smaller than this the time says nothing about the link.
_TELLING_BYTES = 1 << 20
_COMPARABLE = 4
# Falls by less than this, twice in a row, are no falls.
_FALLING = 0.9


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the memory. Units: bytes on their way; seconds from its begin to its end."""

    sent_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows a pass. Units: milliseconds; bytes; bytes a second."""

    go_on: bool
    reason: str
    predicted_ms: float
    remaining_bytes: int
    rate: float


def judge(passes: Sequence[Pass], max_downtime_ms: float, fixed_ms: float) -> Verdict:
    """Say whether another pass is worth it, and why not.

    `fixed_ms` is what a freeze costs when no memory is left to send.
    """
    predictions = [_predict(passes[: i + 1], fixed_ms) for i in range(len(passes))]
    predicted_ms, remaining, rate = predictions[-1]

    def verdict(reason: str) -> Verdict:
        return Verdict(not reason, reason, round(predicted_ms, 1), remaining, rate)

    if predicted_ms <= max_downtime_ms:
        return verdict(f"a downtime of {predicted_ms:.0f} ms is predicted, and {max_downtime_ms:.0f} ms are allowed")
    # The first pass says how fast memory travels, and nothing of how fast it changes: that is known after the next.
    told = [p for p, _, _ in predictions[1:]]
    if len(told) >= 3 and all(late > early * _FALLING for early, late in zip(told[-3:], told[-2:], strict=False)):
        return verdict(f"memory changes as fast as it is sent: {predicted_ms:.0f} ms are predicted, and it does not get less")
    if len(passes) >= MAX_PASSES:
        return verdict(f"after {MAX_PASSES} passes {predicted_ms:.0f} ms are predicted still")
    return verdict("")


def _predict(passes: Sequence[Pass], fixed_ms: float) -> tuple[float, int, float]:
    telling = [p for p in passes if p.sent_bytes >= _TELLING_BYTES and p.seconds > 0]
    last = passes[-1]
    if not telling:
        return fixed_ms, last.sent_bytes, 0.0
    rate = telling[-1].sent_bytes / telling[-1].seconds
    remaining = last.sent_bytes
    if len(passes) > 1 and passes[-2].seconds <= _COMPARABLE * last.seconds:
        # What this pass sent was written to during the one before it. Of a much longer time that says little: it may be
        # a few pages that are written to all the time.
        changing = last.sent_bytes / max(passes[-2].seconds, 1e-6)
        remaining = min(int(changing * last.seconds), last.sent_bytes)
    return fixed_ms + remaining / rate * 1000, remaining, rate
