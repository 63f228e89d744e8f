"""What a host's records of earlier moves tell of the next one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from migrate import places, records


def test_what_a_freeze_cost_lately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "HISTORY", tmp_path)
    assert records.fixed_downtime_ms() is None
    for number, downtime_ms in enumerate([9000, 100, 200, None, 300, 400, 500]):
        directory = tmp_path / f"2026010{number}-000000-abcdef"
        directory.mkdir()
        told = {"downtime_ms": downtime_ms, "iterations": [{"remaining_bytes": 0, "rate": 0.0}]}
        (directory / "report.json").write_text(json.dumps(told))
    (tmp_path / "20260108-000000-abcdef").mkdir()  # a target has no report
    (tmp_path / "20260109-000000-abcdef").mkdir()
    (tmp_path / "20260109-000000-abcdef/report.json").write_text("{")
    assert records.fixed_downtime_ms() == 300, "the median of the last five, not what was long ago"
