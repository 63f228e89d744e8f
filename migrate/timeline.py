"""What a move did when: spans of time, on the coordinator's clock, with what each host tells of its own part."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

_MOST = 500


@dataclass(frozen=True, slots=True)
class Span:
    """Units: milliseconds; `at_ms` is from the beginning of the move. `where` is coordinator, source or target."""

    name: str
    where: str
    at_ms: float
    ms: float


class Timeline:
    """Collects spans. `began` is the beginning of the move, by time.monotonic."""

    def __init__(self, began: float) -> None:
        self._began = began
        self.spans: list[Span] = []

    @contextlib.contextmanager
    def span(self, name: str, where: str = "coordinator") -> Iterator[None]:
        """Note what is done in this context, also when it fails."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, where, started, time.monotonic() - started)

    def add(self, name: str, where: str, started: float, seconds: float) -> None:
        """Note what began at a time, by time.monotonic."""
        if len(self.spans) < _MOST:
            self.spans.append(Span(name, where, round((started - self._began) * 1000, 2), round(seconds * 1000, 2)))

    def take(self, told: Any, where: str, started: float) -> None:
        """Note what a host tells of a call that began at a time: [name, seconds from there, seconds], one for each.

        A host that tells something else is not listened to.
        """
        for entry in told if isinstance(told, list) else ():
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                name, at_s, seconds = entry
                at_s, seconds = float(at_s), float(seconds)
                if math.isfinite(at_s + seconds):
                    self.add(str(name)[:100], where, started + at_s, seconds)

    def as_list(self) -> list[dict[str, Any]]:
        return [asdict(s) for s in sorted(self.spans, key=lambda s: s.at_ms)]
