"""Memory that is sent while the container runs, and filled in while it runs again: `migrate move --pre-copy`."""

from __future__ import annotations

import os
import signal

import pytest

from migrate.journal import read
from tests.e2e.test_move import BUNDLE, NAME, counting, runs_on, start_python
from tests.helpers.bed import Bed
from tests.helpers.memory import PROGRAM, expected, following
from tests.helpers.oci import wait_for
from tests.helpers.stopped import Running, Stopped

__all__ = ["counting"]
pytestmark = following
_MIB = 64


@pytest.fixture
def memory(bed: Bed) -> Bed:
    """A bed with a container that has 64 MiB, and can tell what is in them."""
    bundle = start_python(bed, PROGRAM.format(mib=_MIB, changed=0))
    wait_for((bundle / "rootfs/answer").exists, "the first answer", 60)
    return bed


def ask(bed: Bed, host: str, asked: int) -> None:
    """Have some of the memory changed, and see that all of it is right."""
    rootfs = bed.path(host, f"{BUNDLE}/rootfs")
    (rootfs / "ask").touch()
    wait_for(lambda: (rootfs / "answer").read_text().startswith(f"{asked} "), "an answer", 60)
    assert (rootfs / "answer").read_text() == expected(_MIB, asked)


def test_there_and_back_at_once(memory: Bed) -> None:
    bed = memory
    ask(bed, "host1", 1)
    report = bed.move("host1", NAME, "host2", "--pre-copy", "auto", "--max-downtime", "2s")
    passes, last = report["details"]["precopy"]["memory"], report["details"]["freeze"]["pages"]
    assert passes[0]["content_bytes"] > _MIB << 20 and passes[0]["left_out"] == []
    assert last["content_bytes"] < 16 << 20 and last["late_pages"] < 256, last
    assert report["details"]["finish"]["drain"]["pages"] > _MIB * 256
    # Its memory may still be on its way in: the next move waits for that.
    bed.move("host2", NAME, "host1", "--pre-copy", "always")
    ask(bed, "host1", 2)
    for host in ("host1", "host2"):
        assert bed.ok(host, "find", "/run/ferry", "-name", "*.img") == "", "images are left"


def test_a_small_one(counting: Bed) -> None:
    for here, there in (("host1", "host2"), ("host2", "host1")):
        counting.move(here, NAME, there, "--pre-copy", "always")
        runs_on(counting, there)
    report = counting.move("host1", NAME, "host2", "--pre-copy", "auto")
    assert "memory" not in report["details"]["precopy"], "it is too small for that to pay"


@pytest.mark.parametrize("place", ["precopy.result:after", "freeze.result:after", "restore.result:after", "commit.decided:after"])
@pytest.mark.parametrize("who", ["interrupted", "killed"])
def test_its_coordinator_is_struck(counting: Bed, place: str, who: str) -> None:
    """Where the memory is on its way, nobody waits for ever, nothing runs twice, and what it had on either host goes."""
    command = ("migrate", "move", "--json", "--pre-copy", "always", NAME, "host2")
    move = Stopped(counting, "host1", place, *command)
    move.signal(signal.SIGINT if who == "interrupted" else signal.SIGKILL)
    move.go_on()
    counting.run("host1", "migrate", "recover")
    here, there = ("host2", "host1") if place.startswith("commit") else ("host1", "host2")
    runs_on(counting, here)
    counting.move(here, NAME, there, "--pre-copy", "always")
    runs_on(counting, there)


# Writes to all of its 16 MiB again and again: faster than what may be sent.
_WRITER = """
m = bytearray(16 << 20)
n = 0
while True:
    n = n + 1 & 255
    for i in range(0, len(m), 4096):
        m[i] = n
    open('/round', 'w').write(str(n))
"""


@pytest.fixture
def writing(bed: Bed) -> Bed:
    bundle = start_python(bed, _WRITER)
    wait_for((bundle / "rootfs/round").exists, "the first round", 60)
    return bed


def _goes_on(bed: Bed, host: str) -> None:
    path = bed.path(host, f"{BUNDLE}/rootfs/round")
    at = path.read_text()
    wait_for(lambda: path.read_text() not in (at, ""), "another round", 60)


SLOW = ("--pre-copy", "always", "--bandwidth-limit", "30M", "--compress", "none", "--max-downtime", "110ms")


def test_what_cannot_be_kept_up_with_stays(writing: Bed) -> None:
    done = writing.run("host1", "migrate", "move", *SLOW, "--on-diverge", "abort", NAME, "host2")
    assert done.returncode == 4 and "memory changes as fast as it is sent" in done.stderr, done.stderr
    _goes_on(writing, "host1")
    assert writing.run("host2", "runtime", "state", NAME).returncode != 0


def test_it_is_slowed_down_and_has_its_speed_back(writing: Bed) -> None:
    """The host's limit on the CPU is there only while the container is being copied, on neither host after it."""
    usual = _quota(writing, "host1")
    report = writing.move("host1", NAME, "host2", *SLOW, "--on-diverge", "throttle")
    passes = [p for p in report["details"]["precopy"]["memory"] if "next" in p]
    slowed = [p["allowance"] for p in passes if p["next"] == "throttle"]
    assert slowed == sorted(slowed, reverse=True) and slowed, passes
    assert passes[-1]["next"] == "freeze"
    entries, damaged = read(writing.path("host1", f"/var/lib/ferry/migrations/{report['migration_id']}/journal"))
    assert damaged == 0
    assert [(e["number"], e["next"], e["reason"]) for e in entries if e["mark"] == "pass"] == [
        (p["number"], p["next"], p["reason"]) for p in passes
    ]
    _goes_on(writing, "host2")
    assert _quota(writing, "host2") == usual


def _quota(bed: Bed, host: str) -> str:
    """Return the limit on the container's CPU time, as the host's kernel says it."""
    files = [w for name in ("cpu.cfs_quota_us", "cpu.max") for w in ("-o", "-path", f"*/{NAME}/{name}")][1:]
    found = bed.ok(host, "find", "/sys/fs/cgroup", "(", *files, ")", "-exec", "cat", "{}", "+").split()
    assert found
    return found[0]


@pytest.mark.parametrize("who", [("coordinator",), ("runtime",), ("agent", "runtime")], ids=" ".join)
def test_its_speed_is_back_when_the_move_breaks(writing: Bed, who: tuple[str, ...]) -> None:
    """Whoever is killed while it is slowed down."""
    usual = _quota(writing, "host1")
    move = Running(writing, "host1", "migrate", "move", "--json", *SLOW, "--on-diverge", "throttle", NAME, "host2")
    wait_for(lambda: _quota(writing, "host1") != usual, "the limit", 100)
    pids = [p for kind in who for p in ([move.pid] if kind == "coordinator" else writing.processes("host1", kind))]
    assert len(pids) >= len(who)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    status, _, _ = move.go_on()
    assert status != 0
    writing.ok("host1", "migrate", "recover")
    # An agent that lives undoes its part by itself.
    wait_for(lambda: _quota(writing, "host1") == usual, "its speed", 60)
    _goes_on(writing, "host1")
