"""When a silent host counts as gone. Pure.

A coordinator says in its hello how long it lets others wait, and gives every agent a sign of life three times as often.
"""

from __future__ import annotations

import os

_SHORTEST_S, _LONGEST_S = 1.0, 300.0


def bounded(seconds: float) -> float:
    """Return a time that another host may ask for. Units: seconds."""
    return min(max(seconds, _SHORTEST_S), _LONGEST_S)


def _configured() -> float:
    try:
        return bounded(float(os.environ.get("FERRY_DEAD_AFTER_S", "15")))
    except ValueError:
        return 15.0


# Unanswered for so long, a host is taken for gone.
DEAD_AFTER_S = _configured()
PING_EVERY_S = DEAD_AFTER_S / 3


def idle_timeout_s(dead_after_ms: int) -> float:
    """Return how long an agent waits for a word of a coordinator with that setting."""
    return 2 * bounded(dead_after_ms / 1000)
