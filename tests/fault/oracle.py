"""One container that goes to and fro between two hosts with disks of their own, and what must hold after any fault.

It counts in its shell's memory; the numbers go through an open TCP connection between two more of its processes, and the last of
them writes them to a file. So a number that is lost or said twice is a memory, a connection or a file that was not kept. Beside it
another shell makes a file longer, without a connection that could hold it up: a copy that runs where it should not shows there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from migrate.overlay import DIGEST
from tests.helpers import bridged
from tests.helpers.bed import BUNDLES, NO_REMAINS, ROOT, Bed
from tests.helpers.bundle import BundleMaker, Config, assert_gapless, numbers
from tests.helpers.oci import wait_for

NAME = "c"
BUNDLE = f"{BUNDLES}/{NAME}"
HOSTS = ("host1", "host2")
COUNTING = "while :; do echo >>/ticks; sleep 0.05; done & sleep 10000 | nc -l -p 77 >>/count & sleep 0.1; i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done | nc 127.0.0.1 77"
FLAGS = ("--tcp-established",)
LAYERS, STORE = "/var/lib/images", "/var/lib/ferry/layers"
# What a move is made with beside what all have: its memory sent while it runs; a network of its own that moves along; a root that
# is an overlay.
WAYS = (PRE_COPY, NETWORK, OVERLAY) = ("pre-copy", "network", "overlay")
# A host that says nothing for so long counts as gone: short, so that many cases fit into a run.
ENV = ("FERRY_DEAD_AFTER_S=4",)


def _join(config: Config) -> None:
    next(n for n in config["linux"]["namespaces"] if n["type"] == "network")["path"] = f"/run/netns/{bridged.NET}"


def _is_kept(path: str) -> bool:
    """Say whether a path is of the layers that a host keeps for the next container that has them; what is half of one is not."""
    name = path.removeprefix(STORE).lstrip("/").split("/")[0] if path.startswith(STORE) else "."
    return name == "" or bool(DIGEST.fullmatch(name)) or name.startswith(".used-")


def other(host: str) -> str:
    return HOSTS[1 - HOSTS.index(host)]


class Witness:
    """What a host holds, asked of one process inside it, which goes down with it."""

    def __init__(self, bed: Bed, host: str) -> None:
        self._argv = bed.argv(
            host, sys.executable, "-P", str(ROOT / "tests/fault/witness.py"), str(bed.directory / host / "inherited")
        )
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, question: str) -> Any:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the witness ended when it was asked for its {question}"
        return json.loads(answer)

    def close(self) -> None:
        if self._process:
            with self._process:
                self._process.kill()
            self._process = None


class World:
    """The bed, and where the container runs in it."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.at = ""
        self.ways: frozenset[str] = frozenset()
        self._witnesses = {host: Witness(bed, host) for host in HOSTS}
        self.clean: dict[str, dict[str, list[str]]] = {}
        self.begin()

    @property
    def flags(self) -> tuple[str, ...]:
        return (*FLAGS, "--pre-copy", "always" if PRE_COPY in self.ways else "never")

    def become(self, ways: frozenset[str]) -> None:
        """Have moves be made in some of WAYS."""
        anew = bool({NETWORK, OVERLAY} & (ways ^ self.ways))
        self.ways = ways
        if anew:
            self.begin()

    def begin(self) -> None:
        """Have the container run on host1, anew, and nothing else anywhere."""
        for host in HOSTS:
            self.bed.mend(host)
            for container in self.containers(host):
                self.bed.run(host, "runtime", "delete", "--force", container)
            self.end_agents(host)
            forget = f"umount {BUNDLE}/rootfs 2>/dev/null; rm -rf {BUNDLES} {STORE} {LAYERS} /run/ferry/migrate /var/lib/ferry/migrations"
            self.bed.ok(host, "sh", "-c", f"{forget}; mkdir -p {BUNDLES}")
            bridged.detach(self.bed, host)
            self.bed.ok(host, "sh", "-c", "ip netns add first && ip netns del first")  # the first one makes a mount that stays
        self.clean = {host: self._inventory(host) for host in HOSTS}
        path = self.bed.path("host1", BUNDLE)
        if NETWORK in self.ways:
            bridged.attach(self.bed, "host1")
        BundleMaker(path.parent)("sh", "-c", COUNTING, path=path, change=_join if NETWORK in self.ways else None)
        if OVERLAY in self.ways:
            mount = f"mount -t overlay -o lowerdir={LAYERS}/base,upperdir={BUNDLE}.overlay/upper,workdir={BUNDLE}.overlay/work"
            make = f"mkdir -p {LAYERS} {BUNDLE}.overlay/upper {BUNDLE}.overlay/work; mv {BUNDLE}/rootfs {LAYERS}/base; mkdir {BUNDLE}/rootfs"
            self.bed.ok("host1", "sh", "-ec", f"{make}; {mount} overlay {BUNDLE}/rootfs")
        self.bed.ok("host1", "sync")  # what it begins with is not lost when its host goes down
        self.bed.start("host1", BUNDLE, NAME)
        self.at = "host1"
        self.counts()

    def end_agents(self, host: str) -> None:
        for kind in ("agent", "runtime", "memory", "criu"):
            for pid in self.processes(host, kind):
                os.kill(pid, signal.SIGKILL)

    def processes(self, host: str, kind: str) -> list[int]:
        return self.bed.processes(host, kind)

    @property
    def files(self) -> str:
        """Where the files that it writes are, on the host that it is on."""
        return f"{BUNDLE}.overlay/upper" if OVERLAY in self.ways else f"{BUNDLE}/rootfs"

    def counted(self, host: str) -> list[int]:
        return numbers(self.bed.path(host, f"{self.files}/count"))

    def counts(self) -> None:
        """See that it counts where it runs, without a gap or a repetition."""
        before = len(self.counted(self.at))
        wait_for(lambda: len(self.counted(self.at)) > before + 2, f"counting on {self.at}", 20)
        assert_gapless(self.counted(self.at))

    def containers(self, host: str) -> dict[str, str]:
        found: dict[str, str] = self._witnesses[host]("containers")
        return found

    def unfinished(self, host: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._witnesses[host]("unfinished")
        return found

    def _inventory(self, host: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = self._witnesses[host]("inventory")
        own = (BUNDLE, f"/run/ferry/runtime/{NAME}", "/run/mount")  # the last is mount(8)'s own, of the test
        found["FILES"] = [f for f in found["FILES"] if f not in NO_REMAINS and not f.startswith(own) and not _is_kept(f)]
        found["CGROUPS"] = [c for c in found["CGROUPS"] if not c.endswith(f"/{NAME}")]
        return found

    def running(self) -> list[str]:
        return [h for h in HOSTS if self.containers(h).get(NAME) == "running"]

    def recover(self, host: str, *options: str) -> list[dict[str, Any]]:
        """Recover what a host knows of; what cannot be done yet, since something is still ending, is tried again."""
        for _ in range(3):
            done = self.bed.run(host, "env", *ENV, "migrate", "recover", "--json", *options)
            rows: list[dict[str, Any]] = json.loads(done.stdout)["recovered"] if done.stdout else []
            if done.returncode == 0:
                break
            time.sleep(1)
        return rows

    def state_of_move(self, host: str) -> str:
        """Return what `migrate status` says of the one move that is not over."""
        (row,) = json.loads(self.bed.ok(host, "migrate", "status", "--json"))["moves"]
        return str(row["state"])

    def close(self) -> None:
        for witness in self._witnesses.values():
            witness.close()

    def nothing_is_left(self) -> None:
        """One copy, and nothing of the move but its records."""
        for host in HOSTS:
            containers = self.containers(host)
            assert list(containers) == ([NAME] if host == self.at else []), f"containers on {host}: {containers}"
            for path in (BUNDLE, self.files):
                assert self.bed.path(host, path).exists() == (host == self.at), f"{path} on {host}"
            assert self.unfinished(host) == [], f"moves that are not over on {host}: {self.unfinished(host)}"
            deadline = time.monotonic() + 30
            while self.processes(host, "memory") and time.monotonic() < deadline:
                time.sleep(0.05)
            left = [f"{k} {p}" for k in ("agent", "runtime", "memory", "criu") for p in self.processes(host, k)]
            assert left == [], f"processes on {host}: {left}"
            now = self._inventory(host)
            if host != self.at:
                for kind, before in self.clean[host].items():
                    assert set(now[kind]) <= set(before), f"{kind} on {host}: {sorted(set(now[kind]) - set(before))}"
