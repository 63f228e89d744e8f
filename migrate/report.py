"""What a move did, for people and programs. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from migrate.errors import Outcome


@dataclass(slots=True)
class Report:
    """Units: milliseconds, bytes. `downtime_ms` is from before the freeze was asked for until the target was known to run.

    Times in the move are from its beginning.
    """

    migration_id: str
    container: str
    source: str
    target: str
    outcome: Outcome = Outcome.REFUSED
    downtime_ms: float | None = None
    total_ms: float = 0.0
    wire_bytes: int = 0
    frozen_at_ms: float | None = None
    timeline: list[dict[str, Any]] = field(default_factory=list)  # of migrate.timeline.Span
    iterations: list[dict[str, Any]] = field(default_factory=list)  # passes over the memory, with what followed each
    phases_ms: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    undo_errors: list[str] = field(default_factory=list)
    findings: list[dict[str, str]] = field(default_factory=list)
    settled: bool = True  # nothing is left to do on either host
    resolution: str = ""  # what was found and done, where the move had to be recovered
    recovered: dict[str, Any] | None = None  # the error from which a completed move was recovered

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def human_bytes(count: float) -> str:
    """Write a size as people read it, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def sentence(report: Report) -> str:
    """Say in one line how a move ended."""
    if report.resolution and report.outcome in (Outcome.COMPLETED, Outcome.ROLLED_BACK):
        return report.resolution
    if report.outcome == Outcome.COMPLETED and report.error is not None:
        return f"{report.container} was moved to {report.target}, and runs no more"
    if report.outcome == Outcome.COMPLETED:
        downtime = "unknown" if report.downtime_ms is None else f"{report.downtime_ms:.0f} ms"
        return (
            f"{report.container} runs on {report.target}: downtime {downtime}, "
            f"total {report.total_ms / 1000:.2f} s, {human_bytes(report.wire_bytes)} on the wire"
        )
    if report.outcome == Outcome.ROLLED_BACK:
        return f"{report.container} still runs on {report.source}; {report.target} keeps nothing"
    if report.outcome == Outcome.REFUSED:
        return f"{report.container} was not moved; nothing was touched"
    if report.outcome == Outcome.IN_DOUBT:
        doubt = f"it is not known whether {report.container} runs on {report.target}; on {report.source} it stands still"
        return f"{doubt}; {report.resolution}"
    return f"{report.container} runs on both {report.source} and {report.target}; {report.resolution}"
