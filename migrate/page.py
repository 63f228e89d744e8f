"""A report as one page that needs nothing else: its pictures are drawn in it, and it loads and runs nothing. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from migrate.report import human_bytes
from migrate.story import Bar, Iteration, Story

_ROW, _LEFT, _WIDTH, _RIGHT = 24, 300, 560, 90
_STYLE = """
:root { color-scheme: light dark; --source: #2f7ed8; --target: #1f9d57; --coordinator: #8a8f98; --bad: #c0392b; --line: #8888; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 980px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin-top: 2rem; }
svg { width: 100%; height: auto; font: 13px system-ui, sans-serif; } svg text { fill: currentColor; }
svg line { stroke: var(--line); } svg path { fill: none; stroke: var(--bad); stroke-width: 2; }
.source { fill: var(--source); } .target { fill: var(--target); } .coordinator { fill: var(--coordinator); }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
.error { color: var(--bad); } .key span { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
"""


def page(story: Story) -> str:
    """Return the page, as HTML. Whatever is in the story, it is shown as text only."""
    parts = [f"<h1>{escape(story.title)}</h1>", f"<p><strong>{escape(story.outcome)}</strong>: {escape(story.sentence)}</p>"]
    parts += [f'<p class="error">{escape(e)}</p>' for e in story.errors]
    if story.phases:
        parts += [f"<h2>The move: {story.total_ms / 1000:.2f} s</h2>", _waterfall("phases", story.phases, story.total_ms)]
    if story.iterations:
        parts += ["<h2>Memory, sent while it ran</h2>", _passes(story.iterations), _table(story.iterations)]
    if story.downtime_ms is not None and story.downtime:
        parts += [f"<h2>The downtime: {story.downtime_ms:.0f} ms</h2>", _waterfall("downtime", story.downtime, story.downtime_ms)]
        parts.append(f"<p>between these: words to and fro: {story.between_ms:.1f} ms</p>")
    if story.handed_on:
        parts.append(f"<p>packets that came meanwhile, handed on: {story.handed_on}</p>")
    if story.filled_in:
        parts.append(f"<p>{escape(story.filled_in)}</p>")
    colours = "".join(f'<span style="background: var(--{w})"></span>{w}' for w in ("source", "target", "coordinator"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(story.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<p class="key">{colours}</p>\n</body></html>\n'
    )


def _svg(name: str, height: float, parts: Iterable[str]) -> str:
    width = _LEFT + _WIDTH + _RIGHT
    return f'<svg id="{name}" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _waterfall(name: str, bars: Sequence[Bar], length_ms: float) -> str:
    """One row for each bar, all on the same axis of time."""
    parts, height = [], len(bars) * _ROW + 24
    step = _nice(length_ms / 6)
    for i in range(int(length_ms / step) + 1):
        x = _LEFT + i * step / max(length_ms, 1e-6) * _WIDTH
        parts.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height - 18}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 4}" text-anchor="middle">{_time(i * step)}</text>')
    for row, bar in enumerate(bars):
        y = row * _ROW
        x = _LEFT + bar.at_ms / max(length_ms, 1e-6) * _WIDTH
        width = min(max(bar.ms / max(length_ms, 1e-6) * _WIDTH, 1.0), _LEFT + _WIDTH - x)
        where = bar.where if bar.where in ("source", "target") else "coordinator"
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(bar.name[:44])}</text>')
        parts.append(f'<rect class="{where}" x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" rx="2"/>')
        parts.append(f'<text x="{_LEFT + _WIDTH + 8}" y="{y + 16}">{_time(bar.ms)}</text>')
    return _svg(name, height, parts)


def _passes(iterations: Sequence[Iteration]) -> str:
    """What each pass sent, as columns, and the downtime that was predicted after it, as a line; each on its own scale."""
    height, top = 220.0, 30.0
    most = max(max(i.sent_bytes for i in iterations), 1.0)
    predicted = [i.predicted_ms for i in iterations if i.predicted_ms is not None]
    longest = max([*predicted, 1.0])
    slot = min((_LEFT + _WIDTH) / len(iterations), 90.0)
    parts, points = [], []
    for at, i in enumerate(iterations):
        x, tall = at * slot, i.sent_bytes / most * (height - top - 20)
        parts.append(
            f'<rect class="source" x="{x + slot * 0.15:.1f}" y="{height - 20 - tall:.1f}" '
            f'width="{slot * 0.7:.1f}" height="{tall:.1f}"/>'
        )
        parts.append(f'<text x="{x + slot / 2:.1f}" y="{height - 4:.0f}" text-anchor="middle">{i.number}</text>')
        if i.predicted_ms is not None:
            points.append((x + slot / 2, height - 20 - i.predicted_ms / longest * (height - top - 20)))
    if points:
        parts.append(f'<path d="M{" L".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    parts.append(f'<text x="0" y="14">sent: up to {human_bytes(most)}; line: predicted downtime, up to {longest:.0f} ms</text>')
    return _svg("passes", height, parts)


def _table(iterations: Sequence[Iteration]) -> str:
    rows = []
    for i in iterations:
        predicted = "" if i.predicted_ms is None else f"{i.predicted_ms:.0f} ms"
        cells = (
            str(i.number),
            human_bytes(i.sent_bytes),
            f"{i.seconds:.2f} s",
            f"{human_bytes(i.rate)}/s",
            predicted,
            i.decision,
        )
        rows.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("pass", "sent", "in", "rate", "predicted", "decision"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _nice(step: float) -> float:
    """Return the round number above a step of an axis."""
    step = max(step, 1e-6)
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= step)


def _time(ms: float) -> str:
    return f"{ms / 1000:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"
