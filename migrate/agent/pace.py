"""How far something is, told now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

_EVERY_S = 0.2


def progress(tell: Callable[..., None], then: Callable[[], None]) -> Callable[[int, int], None]:
    """Return what is called with (bytes sent, bytes in all), as often as one likes: now and then it tells, and does `then`."""
    last = [time.monotonic(), 0.0]

    def passed(sent: int, total: int) -> None:
        now = time.monotonic()
        if now - last[0] < _EVERY_S:
            return
        rate = (sent - last[1]) / (now - last[0])
        last[:] = [now, sent]
        tell("progress", sent_bytes=sent, total_bytes=total, rate=rate)
        then()

    return passed
