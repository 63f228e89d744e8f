"""What a host keeps of a move: the journal, the words beside it, the records, the locks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from migrate import durable, locks, places, records
from migrate.errors import Busy, Locked, MigrateError, ProtocolError, UnknownMigration
from migrate.journal import Journal, read

ID = "20260131-120000-abcdef"


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "RUN", tmp_path / "run")
    monkeypatch.setattr(places, "HISTORY", tmp_path / "history")


def test_journal(tmp_path: Path) -> None:
    j = Journal(tmp_path)
    j.append("freeze", "intent", sync=True)
    j.append("freeze", "result", x=1)
    j.close()
    entries, damaged = read(tmp_path / "journal")
    assert [(e["seq"], e["phase"], e["mark"]) for e in entries] == [
        (0, "freeze", "intent"),
        (1, "freeze", "result"),
    ] and not damaged


def test_a_journal_goes_on_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    j = Journal(tmp_path)
    j.append("freeze", "intent")
    j.append("freeze", "result", x=1)
    j.close()
    path = tmp_path / "journal"
    path.write_bytes(path.read_bytes()[:-10])
    j = Journal(tmp_path)
    j.append("recover", "looked")
    j.close()
    entries, damaged = read(path)
    assert [(e["seq"], e["mark"]) for e in entries] == [(0, "intent"), (2, "looked")] and damaged == 1


def test_a_word_is_replaced_in_place(tmp_path: Path) -> None:
    path = tmp_path / "decision"
    durable.create(path, "undecided")
    before = path.stat()
    durable.write(path, "commit")
    assert durable.read(path) == "commit"
    assert (path.stat().st_ino, path.stat().st_size, path.stat().st_blocks) == (before.st_ino, before.st_size, before.st_blocks)
    with pytest.raises(FileExistsError):
        durable.create(path, "undecided")
    assert durable.read(tmp_path / "nothing") is None


def _source(container: str, migration_id: str = ID) -> Path:
    directory = records.make(migration_id)
    durable.create(directory / "decision", durable.UNDECIDED)
    j = Journal(directory)
    j.append("plan", "made", container=container, bundle="/b", source="host1", target="host2")
    j.close()
    return directory


def test_records() -> None:
    directory = _source("c")
    (record,) = records.unfinished()
    assert (record.migration_id, record.role, record.container, record.target, record.outcome) == (ID, "source", "c", "host2", "")
    j = Journal(directory)
    j.append("move", "ended", outcome="COMPLETED")
    j.close()
    records.close(ID)
    assert records.unfinished() == [] and records.find(ID).outcome == "COMPLETED"
    with pytest.raises(UnknownMigration):
        records.find("20260131-120000-ffffff")
    with pytest.raises(MigrateError):
        records.make(ID)


def test_a_move_whose_journal_is_lost_is_still_told() -> None:
    directory = _source("c")
    (directory / "journal").write_bytes(b"\0\0\0\n")
    (record,) = records.unfinished()
    assert record.migration_id == ID and record.container == ""


def test_unfinished_moves_are_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "KEEP", 2)
    _source("c")
    for n in range(5):
        _source("d", f"20260201-12000{n}-abcdef")
        records.close(f"20260201-12000{n}-abcdef")
    assert [r.migration_id for r in records.all_records()] == [ID, "20260201-120003-abcdef", "20260201-120004-abcdef"]


def test_a_lock_is_never_taken_from_the_living() -> None:
    held = locks.take("c", locks.owner(ID, "host9"))
    with pytest.raises(Locked, match=f"being moved already by {ID}, whose coordinator is on host9"):
        locks.take("c", locks.owner("other-move", "host8"))
    assert locks.holder("c") == json.loads(places.lock("c").read_text())
    held.release()
    assert locks.holder("c") is None and not places.lock("c").exists()


def test_a_lock_belongs_to_whoever_inherited_it_too() -> None:
    held = locks.take("c", locks.owner(ID, ""))
    child = subprocess.Popen(["sleep", "100"], pass_fds=(held.fd,))
    os.close(held.fd)
    with pytest.raises(Locked):
        locks.take("c", {})
    child.kill()
    child.wait()
    locks.take("c", {}).release()


def test_a_stale_lock_is_recognised() -> None:
    """Its holder was killed: the file says who that was, and guards nothing."""
    places.lock("c").parent.mkdir(parents=True)
    places.lock("c").write_text(json.dumps({"migration": ID, "pid": 1, "boot_id": "another"}))
    assert locks.holder("c") is None
    locks.take("c", {}).release()


def test_a_host_takes_part_in_so_many_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "MAX_MOVES", 2)
    first, second = locks.take_slot({}), locks.take_slot({})
    with pytest.raises(Busy, match="2 moves already"):
        locks.take_slot({})
    first.release()
    locks.take_slot({}).release()
    second.release()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "../x", "a" * 300, "a\nb"])
def test_names_that_lead_out(name: str) -> None:
    with pytest.raises(ProtocolError):
        places.lock(name)
    with pytest.raises(ProtocolError):
        places.history(name)
