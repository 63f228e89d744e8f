"""A move as it goes on: a live view for people at a terminal, lines otherwise, and JSON lines for programs.

Each is called with (phase, event, fields), as the coordinator tells what happens, and is closed at the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from migrate.phase import WORDS, Phase
from migrate.report import human_bytes

KINDS = ("auto", "live", "plain", "json", "none")


class Progress(Protocol):
    def __call__(self, phase: Phase, event: str, fields: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def make(kind: str, stream: TextIO, as_json: bool) -> Progress:
    """Return what shows a move on a stream; `auto` is nothing where the result is for a program.

    It raises nothing: a terminal that is gone is no reason to leave a move in the middle.
    """
    return _Harmless(_make(kind, stream, as_json))


def _make(kind: str, stream: TextIO, as_json: bool) -> Progress:
    if kind == "auto":
        kind = "none" if as_json else "live" if stream.isatty() else "plain"
    if kind == "live":
        from migrate.cli.live import Live  # it takes a while to import

        return Live(stream)
    kinds: dict[str, Callable[[TextIO], Progress]] = {"plain": Plain, "json": JsonLines, "none": Nothing}
    return kinds[kind](stream)


class _Harmless:
    """Another one, until it fails."""

    def __init__(self, shown: Progress) -> None:
        self.shown: Progress | None = shown

    def __call__(self, phase: Phase, event: str, fields: dict[str, Any]) -> None:
        try:
            if self.shown is not None:
                self.shown(phase, event, fields)
        except Exception:
            self.shown = None

    def close(self) -> None:
        try:
            if self.shown is not None:
                self.shown.close()
        except Exception:
            self.shown = None


class Nothing:
    def __init__(self, stream: TextIO) -> None:
        pass

    def __call__(self, phase: Phase, event: str, fields: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Plain:
    """One line for what is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, phase: Phase, event: str, fields: dict[str, Any]) -> None:
        if event == "note":
            words = fields["words"]
        elif event == "iteration":
            words = iteration(fields)
        elif event == "end":
            words = summary(phase, fields)
        else:
            return
        self._stream.write(f"{phase:10} {words}\n")
        self._stream.flush()

    def close(self) -> None:
        pass


class JsonLines:
    """One object a line for everything, with `phase`, `event`, and `at_s`, the seconds since the first."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._started = stream, time.monotonic()

    def __call__(self, phase: Phase, event: str, fields: dict[str, Any]) -> None:
        at_s = round(time.monotonic() - self._started, 3)
        self._stream.write(json.dumps({"phase": phase, "event": event, "at_s": at_s, **fields}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        pass


def iteration(fields: dict[str, Any]) -> str:
    """Say what one pass over the memory sent, and what follows from it."""
    sent = f"memory, pass {fields['number']}: {human_bytes(fields['content_bytes'])} in {fields['seconds']:.2f} s"
    predicted = f"a downtime of {fields['predicted_ms']:.0f} ms is predicted"
    return f"{sent}; {fields['reason'] or predicted}"


def summary(phase: Phase, fields: dict[str, Any]) -> str:
    """Say what a phase took, and what it sent."""
    parts = []
    if "elapsed_ms" in fields:
        parts.append(f"{fields['elapsed_ms']:.0f} ms")
    shipped = fields.get("passes") or ([fields["delta"], fields["pages"]] if "delta" in fields else [])
    if "content_bytes" in fields:
        shipped = [fields]
    if shipped:
        size, seconds = sum(s["content_bytes"] for s in shipped), sum(s["seconds"] for s in shipped)
        parts.append(f"{human_bytes(size)} at {human_bytes(size / max(seconds, 1e-6))}/s")
    return ", ".join(parts) or WORDS[phase].doing
