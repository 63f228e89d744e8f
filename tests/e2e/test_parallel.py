"""What goes in bulk over several SSH connections at once: `migrate move --parallel`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.e2e.test_move import BUNDLE, NAME, counting, runs_on
from tests.helpers.bed import Bed
from tests.helpers.stopped import Stopped

__all__ = ["counting"]


def _connections(bed: Bed) -> list[int]:
    """Return the `ssh` processes of host1 that lead to an agent."""
    uts, found = os.readlink(f"/proc/{bed.pid_of('host1')}/ns/uts"), []
    for entry in os.listdir("/proc"):
        try:
            argv = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            if entry.isdigit() and os.path.basename(argv[0]) == b"ssh" and os.readlink(f"/proc/{entry}/ns/uts") == uts:
                found.append(int(entry))
        except OSError:
            continue
    return found


def test_there_and_back(counting: Bed) -> None:
    bed = counting
    large = os.urandom(5 << 20)
    bed.path("host1", f"{BUNDLE}/rootfs/large").write_bytes(large)
    for here, there in (("host1", "host2"), ("host2", "host1")):
        report = bed.move(here, NAME, there, "--parallel", "3", "--pre-copy", "always")
        assert report["details"]["prepare"]["connections"] == 3
        runs_on(bed, there)
        assert bed.path(there, f"{BUNDLE}/rootfs/large").read_bytes() == large
    assert _connections(bed) == []


def test_one_of_them_breaks(counting: Bed) -> None:
    bed = counting
    move = Stopped(bed, "host1", "precopy.intent:before", "migrate", "move", "--json", "--parallel", "3", NAME, "host2")
    found = _connections(bed)
    assert len(found) == 3
    os.kill(found[-1], signal.SIGKILL)
    time.sleep(0.5)
    bed.path("host1", f"{BUNDLE}/rootfs/large").write_bytes(os.urandom(5 << 20))
    status, out, _ = move.go_on()
    assert status != 0 and "ROLLED_BACK" in out
    runs_on(bed, "host1")
    assert _connections(bed) == []
    bed.move("host1", NAME, "host2")
    runs_on(bed, "host2")
