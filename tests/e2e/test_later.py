"""Memory that changes faster than it can be sent: the container runs on the target before all of it is there (post-copy)."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_move import BUNDLE, NAME, start_python
from tests.helpers.bed import Bed
from tests.helpers.memory import following
from tests.helpers.oci import wait_for
from tests.helpers.stopped import Stopped

pytestmark = following
_MIB = 24
# Writes to all of its memory again and again, and sees before that it has what was written the last time.
_WRITER = f"""
import os
m = bytearray(os.urandom(4096) * 256 * {_MIB})
n, wrong = 0, 0
for i in range(0, len(m), 4096): m[i] = 0
while True:
    for i in range(0, len(m), 4096):
        wrong += m[i] != n & 255 or m[i + 1] != m[1]
        m[i] = n + 1 & 255
    n += 1
    open('/round.new', 'w').write('%d %d' % (n, wrong)); os.rename('/round.new', '/round')
"""
LAZY = ("--pre-copy", "always", "--compress", "none", "--max-downtime", "110ms", "--on-diverge", "lazy")


@pytest.fixture
def writing(bed: Bed) -> Iterator[Bed]:
    """A bed with a slow link, and a container on host1 that writes."""
    bundle = start_python(bed, _WRITER)
    wait_for((bundle / "rootfs/round").exists, "the first round", 60)
    bed.shape("100mbit")
    yield bed
    bed.shape("10gbit")


def rounds(bed: Bed, host: str) -> int:
    """Return how many rounds it has made, with all of its memory right."""
    path: Path = bed.path(host, f"{BUNDLE}/rootfs/round")
    made, wrong = path.read_text().split()
    assert wrong == "0", "it has memory that is not its own"
    return int(made)


def goes_on(bed: Bed, host: str) -> None:
    at = rounds(bed, host)
    wait_for(lambda: rounds(bed, host) > at + 2, "further rounds", 60)


def test_it_runs_there_before_all_of_it_is(writing: Bed) -> None:
    bed = writing
    before = rounds(bed, "host1")
    report = bed.move("host1", NAME, "host2", *LAZY)
    assert report["iterations"][-1]["next"] == "lazy"
    assert "what is left is sent when it runs there" in report["iterations"][-1]["reason"]
    later = report["details"]["freeze"]["pages"]["later_pages"]
    assert later > _MIB * 128 and report["details"]["freeze"]["pages"]["content_bytes"] < 1 << 20
    assert 0 < report["details"]["commit"]["later"]["pages"] <= later
    assert report["details"]["finish"]["drain"]["later_pages"] == later
    goes_on(bed, "host2")
    assert rounds(bed, "host2") > before and bed.status("host1", NAME) is None
    for host in ("host1", "host2"):
        assert bed.ok(host, "find", "/run/ferry", "-name", "*.img") == "", "images are left"


@pytest.mark.parametrize("place", ["ship.result:after", "restore.result:after", "commit.intent:before"])
def test_interrupted_before_the_decision(writing: Bed, place: str) -> None:
    bed = writing
    move = Stopped(bed, "host1", place, "migrate", "move", "--json", *LAZY, NAME, "host2")
    move.signal(signal.SIGINT)
    assert move.go_on()[0] == 4
    goes_on(bed, "host1")
    assert bed.status("host2", NAME) is None


@pytest.mark.parametrize(
    "place", ["ship.result:after", "commit.decided:after", "commit.released:before", "commit.released:after"]
)
def test_its_coordinator_is_killed(writing: Bed, place: str) -> None:
    """The agents go on by themselves: what was decided needs the rest of its memory."""
    bed = writing
    move = Stopped(bed, "host1", place, "migrate", "move", "--json", *LAZY, NAME, "host2")
    move.signal(signal.SIGKILL)
    move.go_on()
    here, there = ("host2", "host1") if place.startswith("commit") else ("host1", "host2")

    def is_over() -> bool:
        """The agents are busy with it for a while: till then there is nothing to recover."""
        done = bed.run("host1", "migrate", "recover")
        return done.returncode == 0 and bed.status(here, NAME) == "running" and bed.status(there, NAME) is None

    wait_for(is_over, "its end", 60)
    goes_on(bed, here)


def test_the_source_is_gone_before_all_of_it_is_there(writing: Bed) -> None:
    """The copy is killed, the source's is left frozen, and only people know what is right."""
    bed = writing
    move = Stopped(bed, "host1", "commit.released:after", "migrate", "move", "--json", *LAZY, NAME, "host2")
    for pid in bed.processes("host1", "agent"):
        os.kill(pid, signal.SIGKILL)
    status, out, _ = move.go_on()
    assert status == 5, out
    wait_for(lambda: bed.status("host2", NAME) in ("stopped", None), "its end")
    assert bed.status("host1", NAME) == "paused"
    done = bed.run("host1", "migrate", "recover", "--run-on", "source", json.loads(out)["migration_id"])
    assert done.returncode == 0, done.stderr
    goes_on(bed, "host1")
    assert bed.status("host2", NAME) is None


def test_the_target_is_out_of_reach_before_all_of_it_is_there(writing: Bed) -> None:
    """Nobody knows then whether the copy lives: the source's is never given up for it."""
    bed = writing
    env = ("FERRY_DEAD_AFTER_S=4",)
    move = Stopped(bed, "host1", "commit.released:after", "migrate", "move", "--json", *LAZY, NAME, "host2", env=env)
    bed.cut("host2")
    status, out, _ = move.go_on(300)
    assert status == 5, out
    assert bed.status("host1", NAME) == "paused"
    bed.mend("host2")
    wait_for(lambda: bed.status("host2", NAME) in ("stopped", None), "the end of the copy", 180)

    def is_over() -> bool:
        return bed.run("host1", "migrate", "recover", "--run-on", "source", json.loads(out)["migration_id"]).returncode == 0

    wait_for(is_over, "its end", 180)
    goes_on(bed, "host1")
    assert bed.status("host2", NAME) is None
