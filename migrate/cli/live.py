"""A move on a terminal: its phases, what goes over the link and how long that takes still, and the passes over the memory."""

from __future__ import annotations

import time
from typing import Any, TextIO

import rich.live
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from migrate.cli.progress import summary
from migrate.phase import WORDS, Phase
from migrate.report import human_bytes

_REFRESHES_A_SECOND = 5
_SHOWN_PASSES = 8
# How much the newest rate counts: the link's changes from one moment to the next say little of what is to come.
_NEWEST = 0.3


class Live:
    def __init__(self, stream: TextIO) -> None:
        self._said: dict[Phase, str] = {}  # of the phases that are over
        self._phase: Phase | None = None
        self._began = time.monotonic()
        self._sent: tuple[float, float, float] | None = None  # bytes, of how many, bytes a second
        self._passes: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._live = rich.live.Live(
            console=Console(file=stream), get_renderable=self._view, refresh_per_second=_REFRESHES_A_SECOND
        )
        self._live.start()

    def __call__(self, phase: Phase, event: str, fields: dict[str, Any]) -> None:
        if event == "begin":
            self._phase, self._began, self._sent = phase, time.monotonic(), None
        elif event == "end":
            self._said[phase] = summary(phase, fields)
            self._phase, self._sent = None, None
        elif event == "progress":
            rate = fields["rate"]
            if self._sent is not None and self._sent[0] <= fields["sent_bytes"]:
                rate = _NEWEST * rate + (1 - _NEWEST) * self._sent[2]
            self._sent = fields["sent_bytes"], fields["total_bytes"], rate
        elif event == "iteration":
            self._passes.append(fields)
            self._sent = None
        elif event == "note":
            self._notes.append(fields["words"])

    def close(self) -> None:
        """Leave the last view on the terminal."""
        self._live.stop()

    def _view(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for phase in Phase:
            if phase in self._said:
                table.add_row(Text("✓", "green"), phase, Text(self._said[phase]))
            elif phase == self._phase:
                elapsed_s = time.monotonic() - self._began
                table.add_row(Text("▸", "yellow"), Text(phase, "bold"), Text(f"{WORDS[phase].doing} ({elapsed_s:.0f} s)"))
                if (sent := self._sent) is not None:  # it is another thread that tells
                    table.add_row("", "", _bar(*sent))
            else:
                table.add_row(Text("·", "dim"), Text(phase, "dim"), "")
            if phase == Phase.PRECOPY and self._passes:
                table.add_row("", "", _passes(self._passes[-_SHOWN_PASSES:]))
        return Group(table, *(Text(note, "yellow") for note in self._notes))


def _bar(sent: float, total: float, rate: float) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    words = f"{human_bytes(sent)}"
    bar: list[RenderableType] = []
    if total > 0:
        words += f" of {human_bytes(total)}"
        bar = [ProgressBar(total=total, completed=min(sent, total), width=30)]
    words += f", {human_bytes(rate)}/s"
    if total > sent and rate > 0:
        words += f", {duration((total - sent) / rate)} left"
    row.add_row(*bar, Text(words))
    return row


def _passes(passes: list[dict[str, Any]]) -> RenderableType:
    table = Table("pass", "memory", "took", "rate", "left", "predicted downtime", "then", box=None, header_style="dim")
    for p in passes:
        table.add_row(
            str(p["number"]),
            human_bytes(p["content_bytes"]),
            f"{p['seconds']:.2f} s",
            f"{human_bytes(p['rate'])}/s",
            human_bytes(p["remaining_bytes"]),
            f"{p['predicted_ms']:.0f} ms",
            Text(str(p["reason"] or p["next"])),
        )
    return table


def duration(seconds: float) -> str:
    """Write a time as people read it: 9 s, 4:05 min, 1:02 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"
