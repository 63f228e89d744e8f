"""One container that goes to and fro between two hosts with disks of their own, and what must hold after any fault.

It counts in its shell's memory; the numbers go through an open TCP connection between two more of its processes, and the last of
them writes them to a file. So a number that is lost or said twice is a memory, a connection or a file that was not kept.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.helpers.bed import BUNDLES, Bed
from tests.helpers.bundle import BundleMaker, assert_gapless, numbers
from tests.helpers.oci import wait_for

NAME = "c"
BUNDLE = f"{BUNDLES}/{NAME}"
HOSTS = ("host1", "host2")
COUNTING = (
    "sleep 10000 | nc -l -p 77 >>/count & sleep 0.1; i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done | nc 127.0.0.1 77"
)
FLAGS = ("--tcp-established",)
# A host that says nothing for so long counts as gone: short, so that many cases fit into a run.
ENV = ("FERRY_DEAD_AFTER_S=4",)


def other(host: str) -> str:
    return HOSTS[1 - HOSTS.index(host)]


class World:
    """The bed, and where the container runs in it."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.at = ""
        self.clean: dict[str, dict[str, list[str]]] = {}
        self.begin()

    def begin(self) -> None:
        """Have the container run on host1, anew, and nothing else anywhere."""
        for host in HOSTS:
            self.bed.mend(host)
            for container in self.bed.ok(host, "runtime", "list", "--quiet").split():
                self.bed.run(host, "runtime", "delete", "--force", container)
            self.end_agents(host)
            self.bed.ok(host, "sh", "-c", f"rm -rf {BUNDLES} /run/ferry/migrate /var/lib/ferry/migrations; mkdir -p {BUNDLES}")
        self.clean = {host: self._inventory(host) for host in HOSTS}
        path = self.bed.path("host1", BUNDLE)
        BundleMaker(path.parent)("sh", "-c", COUNTING, path=path)
        self.bed.start("host1", BUNDLE, NAME)
        self.at = "host1"
        self.counts()

    def end_agents(self, host: str) -> None:
        for kind in ("agent", "runtime", "criu"):
            for pid in self.processes(host, kind):
                os.kill(pid, signal.SIGKILL)

    def processes(self, host: str, kind: str) -> list[int]:
        """Return the processes of a host, by their pids on this machine: agents, holders of the runtime, or CRIU."""
        namespace = os.readlink(f"/proc/{self.pid_of(host)}/ns/mnt")
        words = {"agent": (b"migrate.agent", b"agent"), "runtime": (b"--hold",), "criu": (b"swrk",)}[kind]
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                argv = (entry / "cmdline").read_bytes().split(b"\0")
                named = any(w in argv for w in words) and (kind != "agent" or any(b"python" in a for a in argv[:1]))
                # CRIU and its holder are in mount namespaces below the host's: what counts is the network, or the UTS name.
                if named and os.readlink(entry / "ns/uts") == os.readlink(f"/proc/{self.pid_of(host)}/ns/uts"):
                    found.append(int(entry.name))
            except OSError:
                continue
        assert namespace
        return found

    def pid_of(self, host: str) -> int:
        return int((self.bed.directory / host / "pid").read_text().split()[0])

    def counted(self, host: str) -> list[int]:
        return numbers(self.bed.path(host, f"{BUNDLE}/rootfs/count"))

    def counts(self) -> None:
        """See that it counts where it runs, without a gap or a repetition."""
        before = len(self.counted(self.at))
        wait_for(lambda: len(self.counted(self.at)) > before + 2, f"counting on {self.at}", 20)
        assert_gapless(self.counted(self.at))

    def _inventory(self, host: str) -> dict[str, list[str]]:
        found = self.bed.inventory(host)
        del found["PROCESSES"]
        own = {
            "/run/criu.kdat",
            "/run/ferry",
            "/run/ferry/migrate",
            "/run/ferry/migrate/locks",
            "/run/ferry/migrate/slots",
            "/run/ferry/runtime",
        }
        own |= {"/var/lib/ferry", BUNDLES}
        found["FILES"] = [f for f in found["FILES"] if f not in own and not f.startswith((BUNDLE, f"/run/ferry/runtime/{NAME}"))]
        found["CGROUPS"] = [c for c in found["CGROUPS"] if not c.endswith(f"/{NAME}")]
        return found

    def running(self) -> list[str]:
        return [h for h in HOSTS if self.bed.status(h, NAME) == "running"]

    def recover(self, host: str, *options: str) -> list[dict[str, Any]]:
        """Recover what a host knows of; what cannot be done yet, since something is still ending, is tried again."""
        for _ in range(3):
            done = self.bed.run(host, "env", *ENV, "migrate", "recover", "--json", *options)
            rows: list[dict[str, Any]] = json.loads(done.stdout)["recovered"] if done.stdout else []
            if done.returncode == 0:
                break
            time.sleep(1)
        return rows

    def open_moves(self, host: str) -> list[dict[str, Any]]:
        moves: list[dict[str, Any]] = json.loads(self.bed.ok(host, "migrate", "status", "--json"))["moves"]
        return moves

    def nothing_is_left(self) -> None:
        """One copy, and nothing of the move but its records."""
        for host in HOSTS:
            containers = self.bed.ok(host, "runtime", "list", "--quiet").split()
            assert containers == ([NAME] if host == self.at else []), f"containers on {host}: {containers}"
            assert self.bed.path(host, BUNDLE).exists() == (host == self.at), f"the bundle on {host}"
            assert self.open_moves(host) == [], f"moves that are not over on {host}: {self.open_moves(host)}"
            left = [f"{k} {p}" for k in ("agent", "runtime", "criu") for p in self.processes(host, k)]
            assert left == [], f"processes on {host}: {left}"
            now = self._inventory(host)
            if host != self.at:
                for kind, before in self.clean[host].items():
                    assert set(now[kind]) <= set(before), f"{kind} on {host}: {sorted(set(now[kind]) - set(before))}"
