"""What a report tells people: its numbers put in order, for a terminal or for a page. Pure.

A report may come from another host, and from another version of Ferry: what it lacks is left out, and nothing in it is trusted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from migrate.errors import Outcome, printable
from migrate.phase import Phase
from migrate.report import Report, human_bytes, sentence

_WIDTH = 40
_PHASES = {str(p) for p in Phase}


@dataclass(frozen=True, slots=True)
class Bar:
    """A span of time in a picture. Units: milliseconds, `at_ms` from the picture's beginning."""

    name: str
    where: str
    at_ms: float
    ms: float


@dataclass(frozen=True, slots=True)
class Iteration:
    """One pass over the memory. Units: bytes, seconds, bytes a second, milliseconds (None where nothing was decided)."""

    number: int
    sent_bytes: float
    seconds: float
    predicted_ms: float | None
    decision: str

    @property
    def rate(self) -> float:
        return self.sent_bytes / max(self.seconds, 1e-6)


@dataclass(frozen=True, slots=True)
class Story:
    """Units: milliseconds."""

    title: str
    outcome: str
    sentence: str
    errors: tuple[str, ...]
    total_ms: float
    downtime_ms: float | None
    phases: tuple[Bar, ...]
    iterations: tuple[Iteration, ...]
    downtime: tuple[Bar, ...]
    between_ms: float  # of the downtime, what no bar covers: the words that went to and fro
    handed_on: int = 0  # packets that came for it meanwhile
    filled_in: str = ""  # how its memory came in while it ran already


def tell(document: dict[str, Any]) -> Story:
    """Read a report, as Report.as_dict writes it."""
    migration_id, container, source, target = (_text(document, k) for k in ("migration_id", "container", "source", "target"))
    report = Report(migration_id, container, source, target, resolution=_text(document, "resolution"))
    report.outcome = Outcome(document["outcome"]) if document.get("outcome") in list(Outcome) else Outcome.REFUSED
    report.downtime_ms, report.total_ms = _number(document.get("downtime_ms")), _number(document.get("total_ms")) or 0.0
    report.wire_bytes = int(_number(document.get("wire_bytes")) or 0)
    report.error = document["error"] if isinstance(document.get("error"), dict) else None
    errors = [_text(report.error, "message")] if report.error else []
    undo = document.get("undo_errors")
    errors += [printable(str(e)) for e in undo] if isinstance(undo, list) else []
    bars = list(_bars(document.get("timeline")))
    frozen_ms = _number(document.get("frozen_at_ms"))
    downtime: tuple[Bar, ...] = ()
    between_ms = 0.0
    if frozen_ms is not None and report.downtime_ms is not None:
        downtime = tuple(_within([b for b in bars if not _is_phase(b)], frozen_ms, report.downtime_ms))
        between_ms = max(report.downtime_ms - _covered(downtime), 0.0)
    return Story(
        title=f"{report.migration_id}: {report.container} from {report.source} to {report.target}",
        outcome=str(report.outcome),
        sentence=sentence(report),
        errors=tuple(e for e in errors if e),
        total_ms=report.total_ms,
        downtime_ms=report.downtime_ms,
        phases=tuple(b for b in bars if _is_phase(b)),
        iterations=tuple(_iterations(document)),
        downtime=downtime,
        between_ms=between_ms,
        handed_on=int(_number(_details(document, Phase.COMMIT).get("frames")) or 0),
        filled_in=_filled_in(_details(document, Phase.FINISH).get("drain")),
    )


def _details(document: dict[str, Any], phase: Phase) -> dict[str, Any]:
    details = document.get("details")
    found = details.get(str(phase)) if isinstance(details, dict) else None
    return found if isinstance(found, dict) else {}


def _filled_in(drain: Any) -> str:
    if not isinstance(drain, dict):
        return ""
    if drain.get("filling"):
        return "its memory was still being filled in when the move was over"
    pages, waited, seconds = (_number(drain.get(k)) for k in ("pages", "waited_for", "seconds"))
    if pages is None or seconds is None:
        return ""
    size, later = human_bytes(pages * 4096), _number(drain.get("later_pages"))
    came = f", of which {human_bytes(later * 4096)} came after the freeze" if later else ""
    return f"memory filled in while it ran: {size}{came} in {seconds:.2f} s; {waited or 0:.0f} times it waited for some"


def _is_phase(bar: Bar) -> bool:
    return bar.where == "coordinator" and bar.name in _PHASES


def _text(document: dict[str, Any], key: str) -> str:
    return printable(str(document.get(key) or ""))[:300]


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and 0 <= value < 1e15:
        return float(value)
    return None


def _bars(timeline: Any) -> Iterable[Bar]:
    for entry in timeline if isinstance(timeline, list) else ():
        if isinstance(entry, dict):
            at_ms, ms = _number(entry.get("at_ms")), _number(entry.get("ms"))
            if at_ms is not None and ms is not None:
                yield Bar(_text(entry, "name"), _text(entry, "where"), at_ms, ms)


def _within(bars: list[Bar], from_ms: float, length_ms: float) -> Iterable[Bar]:
    """Give the bars that have a part in a time, seen from its beginning, cut at its end."""
    for bar in sorted(bars, key=lambda b: (b.at_ms, -b.ms)):
        start, end = max(bar.at_ms - from_ms, 0.0), min(bar.at_ms + bar.ms - from_ms, length_ms)
        if end > start or (end == start and 0 <= bar.at_ms - from_ms < length_ms):
            yield Bar(bar.name, bar.where, start, end - start)


def _covered(bars: Iterable[Bar]) -> float:
    total = end = 0.0
    for bar in bars:
        total += max(bar.at_ms + bar.ms - max(end, bar.at_ms), 0.0)
        end = max(end, bar.at_ms + bar.ms)
    return total


def _iterations(document: dict[str, Any]) -> Iterable[Iteration]:
    passes = document.get("iterations")
    for number, entry in enumerate(passes if isinstance(passes, list) else (), 1):
        if isinstance(entry, dict):
            size, seconds = _number(entry.get("content_bytes")) or 0.0, _number(entry.get("seconds")) or 0.0
            yield Iteration(number, size, seconds, _number(entry.get("predicted_ms")), _text(entry, "reason"))


def lines(story: Story) -> list[str]:
    """Write it for a terminal."""
    out = [story.title, f"  {story.outcome}: {story.sentence}", *(f"  error: {e}" for e in story.errors)]
    if story.phases:
        out += ["", "phases", *_drawn(story.phases, max(story.total_ms, 1e-6))]
    if story.iterations:
        out += ["", "memory, sent while it ran"]
        for i in story.iterations:
            predicted = (
                "" if i.predicted_ms is None else f"; {i.decision or f'a downtime of {i.predicted_ms:.0f} ms is predicted'}"
            )
            out.append(
                f"  pass {i.number:<3} {human_bytes(i.sent_bytes):>10} in {i.seconds:.2f} s, {human_bytes(i.rate)}/s{predicted}"
            )
    if story.downtime_ms is not None and story.downtime:
        out += ["", f"downtime, {story.downtime_ms:.0f} ms", *_drawn(story.downtime, story.downtime_ms)]
        out.append(f"  {'':11} {'between these: words to and fro':34} {'':{_WIDTH}} {story.between_ms:9.1f} ms")
    if story.handed_on:
        out += ["", f"packets that came meanwhile, handed on: {story.handed_on}"]
    if story.filled_in:
        out += ["", story.filled_in]
    return out


def _drawn(bars: Iterable[Bar], length_ms: float) -> list[str]:
    out = []
    for bar in bars:
        start = min(int(bar.at_ms / length_ms * _WIDTH), _WIDTH - 1)
        size = min(max(round(bar.ms / length_ms * _WIDTH), 1), _WIDTH - start)
        out.append(f"  {bar.where:11} {bar.name[:34]:34} {' ' * start + '#' * size:{_WIDTH}} {bar.ms:9.1f} ms")
    return out
