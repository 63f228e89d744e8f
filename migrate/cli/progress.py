"""A move as it goes on: one line a phase, and on a terminal the running bytes and rate in it."""

from __future__ import annotations

from typing import Any, TextIO

from migrate.phase import WORDS, Phase
from migrate.report import human_bytes


class Progress:
    """Called with (phase, event, fields); writes to a stream unless it is quiet."""

    def __init__(self, stream: TextIO, quiet: bool) -> None:
        self._stream, self._quiet = stream, quiet
        self._terminal = stream.isatty()
        self._open_line = False

    def __call__(self, phase: Phase, event: str, fields: dict[str, Any]) -> None:
        if self._quiet:
            return
        if event == "note":
            self._rewrite(f"{phase:10} {fields['words']}", last=True)
        elif event == "begin" and self._terminal:
            self._rewrite(f"{phase:10} {WORDS[phase].doing} ...")
        elif event == "progress" and self._terminal:
            sent, total, rate = (fields[k] for k in ("sent_bytes", "total_bytes", "rate"))
            self._rewrite(f"{phase:10} {human_bytes(sent)} of {human_bytes(total)}, {human_bytes(rate)}/s")
        elif event == "iteration":
            self._rewrite(f"{phase:10} {_iteration(fields)}", last=True)
        elif event == "end":
            self._rewrite(f"{phase:10} {_summary(phase, fields)}", last=True)

    def _rewrite(self, text: str, last: bool = False) -> None:
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else text)
        if last:
            self._stream.write("\n")
        self._open_line = not last
        self._stream.flush()

    def close(self) -> None:
        """End a line that a failure left open."""
        if self._open_line and not self._quiet:
            self._stream.write("\n")


def _iteration(fields: dict[str, Any]) -> str:
    sent = f"memory, pass {fields['number']}: {human_bytes(fields['content_bytes'])} in {fields['seconds']:.2f} s"
    predicted = f"a downtime of {fields['predicted_ms']:.0f} ms is predicted"
    return f"{sent}; {fields['reason'] or predicted}"


def _summary(phase: Phase, fields: dict[str, Any]) -> str:
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
