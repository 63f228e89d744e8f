"""Memory that is sent while the container runs, and filled in while it runs again: `migrate move --pre-copy`."""

from __future__ import annotations

import signal

import pytest

from tests.e2e.test_move import BUNDLE, NAME, counting, runs_on, start_python
from tests.helpers.bed import Bed
from tests.helpers.memory import PROGRAM, expected, following
from tests.helpers.oci import wait_for
from tests.helpers.stopped import Stopped

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
