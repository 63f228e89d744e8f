"""The journal and the words beside it, cut and flipped at every byte: recovery does what is safe, or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate import durable, places, records
from migrate.errors import MigrateError
from migrate.journal import Journal, read
from migrate.recover import Action, Decision, Source, Target, decide

ID = "20260131-120000-abcdef"
PLAN = {"container": "c", "bundle": "/var/lib/ferry/bundles/c", "source": "host1", "target": "host2", "created": "2026-01-31"}
ENTRIES: list[tuple[str, str, dict[str, Any]]] = [
    ("plan", "made", PLAN),
    ("prepare", "intent", {}),
    ("prepare", "result", {}),
    ("freeze", "intent", {}),
    ("freeze", "result", {"pages": {"content_bytes": 4096}}),
    ("restore", "result", {"pid": 17}),
    ("commit", "intent", {}),
    ("commit", "decided", {}),
    ("commit", "released", {}),
    ("commit", "result", {}),
]
NOT_RUN = {Target.ABSENT, Target.IMAGES, Target.HELD}
# What a move can have come to, as it is: (decision, source, target)
TRUTHS = [
    (d, s, t)
    for d in (Decision.NONE, Decision.COMMIT)
    for s in Source
    for t in Target
    if t != Target.UNREACHABLE and not (d == Decision.NONE and t not in NOT_RUN)
]


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "RUN", tmp_path / "run")
    monkeypatch.setattr(places, "HISTORY", tmp_path / "history")


@pytest.fixture
def directory() -> Path:
    made = records.make(ID)
    durable.create(made / "decision", durable.UNDECIDED)
    journal = Journal(made)
    for phase, mark, fields in ENTRIES:
        journal.append(phase, mark, **fields)
    journal.close()
    return made


def damaged(data: bytes) -> Iterator[bytes]:
    """Cut at every byte; every byte with one bit of it flipped, and with all of them."""
    for n in range(len(data)):
        yield data[:n]
        for value in (data[n] ^ 1, data[n] ^ 0xFF):
            yield data[:n] + bytes([value]) + data[n + 1 :]


def is_safe(action: Action, truth: Decision, source: Source, target: Target) -> bool:
    """Say whether an action neither doubles a container nor ends the last copy, whatever was known when it was chosen."""
    if action in (Action.ROLL_BACK, Action.ROLL_BACK_HERE):
        # What never ran is ended first, where it can be reached.
        return target in NOT_RUN and (action == Action.ROLL_BACK or truth == Decision.NONE)
    if action == Action.RELEASE:
        return source != Source.RUNNING and target == Target.HELD
    if action == Action.RESTORE_AGAIN:
        return source == Source.GONE and target == Target.IMAGES and truth == Decision.COMMIT
    if action == Action.FINISH:
        return target not in NOT_RUN and source != Source.RUNNING
    return True  # nothing is let run, and nothing ended


@pytest.mark.parametrize("word", [durable.UNDECIDED, durable.COMMIT, durable.REVOKED])
def test_decision(directory: Path, word: str) -> None:
    path = directory / "decision"
    durable.write(path, word)
    truth = records.left(directory).decision
    assert truth == (Decision.COMMIT if word == durable.COMMIT else Decision.NONE)
    cases = 0
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        found = records.left(directory).decision
        # Space around the word may be damaged without its becoming another.
        assert found == truth or found == Decision.DAMAGED, data
        for decision, source, target in TRUTHS:
            if decision == truth:
                cases += 1
                for seen in (target, Target.UNREACHABLE):
                    action = decide(found, source, seen)
                    assert is_safe(action, truth, source, target), (data, source, target, action)
    assert cases > 500


def test_journal(directory: Path) -> None:
    path = directory / "journal"
    whole = path.read_bytes()
    entries, _ = read(path)
    true = records.left(directory)
    assert true.was_released
    for data in damaged(whole):
        path.write_bytes(data)
        found, _ = read(path)
        assert all(entry in entries for entry in found), "an entry that was never written"
        try:
            assert records.plan(directory) == entries[0]
        except MigrateError as e:
            assert "is damaged" in e.message
        left = records.left(directory)
        # It may tell less than the truth, never more.
        assert left.was_released <= true.was_released and left.ran_on <= true.ran_on
        assert left.decision == true.decision
        (record,) = records.unfinished()
        assert record.migration_id == ID and record.outcome == ""
        journal = Journal(directory)
        journal.append("recover", "looked", found=True)
        journal.close()
        assert read(path)[0][-1]["found"] is True, "what is written after the damage can be read"


@pytest.mark.parametrize("word", [durable.UNDECIDED, durable.RELEASED, durable.RAN])
def test_release(word: str) -> None:
    """What was damaged counts as released: nobody takes a container for one that never ran."""
    directory = records.make(ID)
    path = directory / "released"
    durable.create(path, durable.UNDECIDED)
    durable.write(path, word)
    truth = records.was_released(ID)
    assert truth == (word != durable.UNDECIDED)
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        assert records.was_released(ID) >= truth, data


@pytest.mark.parametrize(
    "note", [{"container": "c", "bundle": "/b", "source": "host1", "target": "host2", "inode": 5, "boot_id": "x"}]
)
def test_note_of_a_target(note: dict[str, Any]) -> None:
    directory = records.make(ID)
    path = directory / "target.json"
    for data in damaged(json.dumps(note).encode()):
        path.write_bytes(data)
        (record,) = records.unfinished()
        assert record.migration_id == ID
        try:
            found = records.target(directory)
        except MigrateError:
            continue
        assert isinstance(found["container"], str) and isinstance(found["bundle"], str)
