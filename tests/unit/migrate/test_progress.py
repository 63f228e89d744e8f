"""How a move is shown while it goes on: to people at a terminal, to people who read lines, to programs."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from migrate.cli.live import Live, duration
from migrate.cli.progress import KINDS, JsonLines, Plain, make
from migrate.phase import Phase

PASS = {
    "number": 1, "content_bytes": 64 << 20, "seconds": 0.5, "rate": 128 << 20, "remaining_bytes": 8 << 20, "predicted_ms": 162.5,
    "reason": "", "next": "again",
}  # fmt: skip
EVENTS: list[tuple[Phase, str, dict[str, Any]]] = [
    (Phase.PREFLIGHT, "begin", {}),
    (Phase.PREFLIGHT, "end", {}),
    (Phase.PRECOPY, "begin", {}),
    (Phase.PRECOPY, "progress", {"sent_bytes": 25 << 20, "total_bytes": 100 << 20, "rate": 5 << 20}),
    (Phase.PRECOPY, "iteration", PASS),
    (Phase.PRECOPY, "progress", {"sent_bytes": 50 << 20, "total_bytes": 0, "rate": 5 << 20}),
    (Phase.PRECOPY, "note", {"words": "something that matters"}),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def kind_of(kind: str, stream: io.StringIO, as_json: bool) -> str:
    made = make(kind, stream, as_json)
    made.close()
    return type(made.shown).__name__  # type: ignore[attr-defined]


def test_what_is_made_when_nobody_says() -> None:
    assert kind_of("auto", Terminal(), True) == "Nothing"
    assert kind_of("auto", io.StringIO(), False) == "Plain"
    assert kind_of("auto", Terminal(), False) == "Live"
    assert {kind_of(kind, io.StringIO(), False) for kind in KINDS} == {"Plain", "Live", "JsonLines", "Nothing"}


@pytest.mark.parametrize("kind", ["plain", "json", "live"])
def test_a_terminal_that_is_gone_stops_no_move(kind: str) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    shown = make(kind, Terminal(), False)
    vars(shown)["shown"] = make(kind, Gone(), False).shown if kind != "live" else shown.shown  # type: ignore[attr-defined]
    for event in [*EVENTS, (Phase.PRECOPY, "iteration", {**PASS, "reason": "[/no markup]"})]:
        shown(*event)
    shown.close()


def test_lines() -> None:
    out = io.StringIO()
    plain = Plain(out)
    for event in EVENTS:
        plain(*event)
    first, second, third = out.getvalue().splitlines()
    assert first == "preflight  look at both hosts"
    assert second.startswith("precopy    memory, pass 1: 64.0 MiB in 0.50 s; a downtime of 162 ms is predicted")
    assert third == "precopy    something that matters"
    assert "\x1b" not in out.getvalue()


def test_json_lines() -> None:
    out = io.StringIO()
    lines = JsonLines(out)
    for event in EVENTS:
        lines(*event)
    read = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(r["phase"], r["event"]) for r in read] == [(p, e) for p, e, _ in EVENTS]
    assert read[4] == {**PASS, "phase": "precopy", "event": "iteration", "at_s": read[4]["at_s"]}
    assert [r["at_s"] for r in read] == sorted(r["at_s"] for r in read)


def test_the_live_view() -> None:
    out = Terminal()
    live = Live(out)

    def shown() -> str:
        console = Console(file=io.StringIO(), width=120)
        with console.capture() as capture:
            console.print(live._view())
        return capture.get()

    try:
        for event in EVENTS[:4]:
            live(*event)
        # 75 MiB are left, at 5 MiB/s
        assert "25.0 MiB of 100.0 MiB, 5.0 MiB/s, 15 s left" in shown()
        assert "✓ preflight look at both hosts" in shown()
        for event in EVENTS[4:]:
            live(*event)
        text = shown()
        assert "50.0 MiB, 5.0 MiB/s" in text and "left\n" not in text, "nobody knows of how much"
        assert text.split().count("162") == 1 and "something that matters" in text
        assert "· commit" in text
    finally:
        live.close()
    assert "something that matters" in out.getvalue(), "the last view stays on the terminal"


def test_no_more_than_fits_is_shown_of_many_passes() -> None:
    live = Live(Terminal())
    live(Phase.PRECOPY, "begin", {})
    for number in range(30):
        live(Phase.PRECOPY, "iteration", {**PASS, "number": number})
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(live._view())
    live.close()
    assert len(capture.get().splitlines()) < 24


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59.6, "1:00 min"), (245, "4:05 min"), (3725, "1:02 h")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
