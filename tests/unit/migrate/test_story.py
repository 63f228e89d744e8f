"""What a report tells people, on a terminal and on a page; also one that lies, or is of another version."""

from __future__ import annotations

import time
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import Outcome
from migrate.page import page
from migrate.report import Report
from migrate.story import Bar, lines, tell
from migrate.timeline import Timeline


def report() -> dict[str, Any]:
    document = Report("20261125-101112-abcdef", "web", "host1", "host2", Outcome.COMPLETED, 100.0, 2000.0, 5 << 20).as_dict()
    spans = [
        ("preflight", "coordinator", 0, 400), ("prepare", "coordinator", 400, 200), ("precopy", "coordinator", 600, 900),
        ("memory, pass 1", "source", 650, 300), ("journal: freeze intent", "source", 1500, 4), ("freeze", "coordinator", 1504, 40),
        ("freeze", "source", 1505, 9), ("files", "source", 1514, 10), ("dump; the memory goes", "source", 1514, 28),
        ("restore", "coordinator", 1550, 40), ("prepare the restore", "target", 1551, 4), ("restore", "target", 1555, 34),
        ("release, on disk; it runs", "target", 1593, 30), ("finish", "coordinator", 1620, 300),
    ]  # fmt: skip
    document["timeline"] = [{"name": n, "where": w, "at_ms": at, "ms": ms} for n, w, at, ms in spans]
    document["frozen_at_ms"] = 1500.0
    sent = {"content_bytes": 64 << 20, "seconds": 0.3, "predicted_ms": 800.0, "reason": ""}
    last = {"content_bytes": 1 << 20, "seconds": 0.02, "predicted_ms": 120.0, "reason": "a downtime of 120 ms is predicted"}
    document["iterations"] = [sent, last, {"content_bytes": 4096, "seconds": 0.01}]
    return document


def test_it_is_put_in_order() -> None:
    story = tell(report())
    assert [b.name for b in story.phases] == ["preflight", "prepare", "precopy", "freeze", "restore", "finish"]
    assert [i.predicted_ms for i in story.iterations] == [800.0, 120.0, None]
    assert Bar("freeze", "source", 5, 9) in story.downtime
    # What began in it is cut at its end, and what is before it or after it is not in it.
    assert story.downtime[-1] == Bar("release, on disk; it runs", "target", 93, 7)
    assert not {"memory, pass 1", "finish"} & {b.name for b in story.downtime}
    assert story.between_ms == pytest.approx(100 - 4 - 9 - 28 - 4 - 34 - 7)


def test_what_was_handed_on() -> None:
    document = report()
    assert not any("handed on" in line for line in lines(tell(document)))
    document["details"] = {"commit": {"frames": 17}}
    assert lines(tell(document))[-1] == "packets that came meanwhile, handed on: 17"
    assert "handed on: 17" in page(tell(document))
    for other in ({"commit": {"frames": "x"}}, {"commit": 5}, 7):
        assert tell({**document, "details": other}).handed_on == 0


def test_on_a_terminal() -> None:
    text = "\n".join(lines(tell(report())))
    assert "web runs on host2: downtime 100 ms" in text
    assert "pass 1     64.0 MiB in 0.30 s, 213.3 MiB/s; a downtime of 800 ms is predicted" in text
    bars = [line for line in text.splitlines() if line.endswith(" ms") and "#" in line]
    assert len(bars) == 6 + 7
    assert max(map(len, bars)) < 120


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "strong", "svg", "line", "text", "rect", "path",
        "table", "tr", "th", "td", "span"}  # fmt: skip


def parsed(text: str) -> _Tags:
    tags = _Tags()
    tags.feed(text)
    return tags


def test_the_page_has_its_pictures() -> None:
    found = parsed(page(tell(report())))
    assert found.tags.count("svg") == 3 and found.tags.count("rect") == 6 + 3 + 7
    assert set(found.tags) <= TAGS
    assert not [value for name, value in found.attributes if name in ("src", "href")], "it loads something"


NASTY = st.sampled_from(
    ["<script>alert(1)</script>", '"><img src=x onerror=y>', "\x1b]0;x\x07", "'", "&lt;", "a" * 5000, "\u202e"]
)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | NASTY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NASTY, inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_a_report_that_lies(data: st.DataObject) -> None:
    document = report()
    for key in data.draw(st.sets(st.sampled_from([*document, "unknown"]), min_size=1)):
        document[key] = data.draw(ANYTHING)
    for entry in document["timeline"] if isinstance(document["timeline"], list) else ():
        if isinstance(entry, dict) and data.draw(st.booleans()):
            entry[data.draw(st.sampled_from(["name", "where", "at_ms", "ms"]))] = data.draw(ANYTHING)
    story = tell(document)
    assert "\x1b" not in "\n".join(lines(story))
    text = page(story)
    assert set(parsed(text).tags) <= TAGS
    assert "nan" not in text.split("</style>")[1].replace("alert", "") or "nan" in str(document)


def test_an_empty_one() -> None:
    assert lines(tell({})) and "<h1>" in page(tell({}))


def test_what_a_host_tells_of_its_part() -> None:
    began = time.monotonic()
    timeline = Timeline(began)
    timeline.take([["dump", 0.01, 0.02], ["x"], None, ["y", "no", 1], ["z", float("inf"), 1]], "source", began + 1)
    timeline.take({"no": "list"}, "target", began)
    assert timeline.as_list()[0] == {"name": "dump", "where": "source", "at_ms": 1010.0, "ms": 20.0}
    with pytest.raises(ValueError), timeline.span("fails"):
        raise ValueError
    assert timeline.spans[-1].name == "fails"
    timeline.take([["much", 0, 0]] * 10_000, "source", began)
    assert len(timeline.spans) <= 500


def test_how_its_memory_came_in() -> None:
    def told(drain: object) -> str:
        return tell({**report(), "details": {"finish": {"drain": drain}}}).filled_in

    words = told({"pages": 25600, "waited_for": 12, "seconds": 0.25})
    assert words == "memory filled in while it ran: 100.0 MiB in 0.25 s; 12 times it waited for some"
    assert words in lines(
        tell({**report(), "details": {"finish": {"drain": {"pages": 25600, "waited_for": 12, "seconds": 0.25}}}})
    )
    assert "still being filled in" in told({"filling": True})
    for other in ({}, [], None, {"pages": "many"}, {"pages": 1}, {"failed": "it was killed"}):
        assert told(other) == ""


def test_a_container_that_was_lost_after_it_had_been_moved() -> None:
    error = {"kind": "MemoryLost", "code": "memory-lost", "message": "c was killed on host2: no memory", "hint": None}
    story = tell({**report(), "outcome": "COMPLETED", "resolution": "", "error": error})
    assert "runs no more" in story.sentence and story.errors == ("c was killed on host2: no memory",)
