"""The bed itself: several at once, and one that died badly."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.helpers.bed import ROOT, Bed
from tests.helpers.leaks import Snapshot


def test_hosts_are_hosts(bed: Bed) -> None:
    assert [bed.ok(h, "hostname").strip() for h in ("host1", "host2")] == ["host1", "host2"]
    assert bed.ok("host1", "ssh", "-o", "BatchMode=yes", "host2", "hostname").strip() == "host2"
    bed.ok("host1", "sh", "-c", "echo x >/run/mark; echo x >/var/lib/mark; echo x >/tmp/mark")
    assert bed.run("host2", "sh", "-c", "ls /run/mark /var/lib/mark /tmp/mark").stdout == ""
    bed.ok("host1", "rm", "/run/mark", "/var/lib/mark", "/tmp/mark")
    client = subprocess.run(
        [str(ROOT / "scripts/bed"), bed.name, "client", "bash", "-c", "read -r x </dev/tcp/198.51.100.2/22; echo $x"],
        capture_output=True,
        text=True,
    )
    assert client.stdout.startswith("SSH-2.0")


def test_two_beds_and_one_that_died(bed: Bed) -> None:
    before = Snapshot.take()
    other = Bed(f"other-{os.getpid()}")
    other.up()
    try:
        assert other.ok("host1", "hostname").strip() == "host1"
        # It dies badly: its first processes are killed, and what it wrote down of itself is lost.
        for host in ("host1", "host2"):
            pid = int((other.directory / host / "pid").read_text().split()[0])
            os.kill(pid, signal.SIGKILL)
            (other.directory / host / "pid").unlink()
        other.up()
        assert other.ok("host1", "ssh", "host2", "hostname").strip() == "host2"
        assert bed.ok("host1", "hostname").strip() == "host1", "another bed was hurt"
    finally:
        other.down()
    assert not Path(other.directory).exists()
    assert Snapshot.take().more_than(before) == []
