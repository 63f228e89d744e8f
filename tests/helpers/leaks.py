"""What the machine holds besides files: the tests compare it before and after.

What belongs to a bed (scripts/bed) is left out: those look after themselves, and may come and go beside other tests.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# podman makes these at its first container, and keeps them.
OTHERS = ("/libpod_parent", "/libpod_parent/conmon")
_BED = re.compile(r"(^|/)ferry-[a-z0-9-]+-(host1|host2|client|switch)\b|^/var/tmp/ferry-")


@dataclass(frozen=True)
class Snapshot:
    mounts: frozenset[str]
    cgroups: frozenset[str]
    netns: frozenset[str]
    processes: frozenset[tuple[int, str]]

    @classmethod
    def take(cls) -> Snapshot:
        mounts = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
        cgroups = (base for base, _, _ in os.walk("/sys/fs/cgroup") if not base.endswith(OTHERS) and "/process_api" not in base)
        netns = os.listdir("/run/netns") if Path("/run/netns").exists() else []
        return cls(_without_beds(mounts), _without_beds(cgroups), _without_beds(netns), frozenset(_processes()))

    def _difference(self, before: Snapshot) -> list[str]:
        left = [f"mount {m}" for m in self.mounts - before.mounts]
        left += [f"cgroup {c}" for c in self.cgroups - before.cgroups]
        left += [f"network namespace {n}" for n in self.netns - before.netns]
        left += [f"process {p} {c}" for p, c in self.processes - before.processes]
        return sorted(left)

    def more_than(self, before: Snapshot, patience_s: float = 5.0) -> list[str]:
        """Return what is there now and was not before. What is ending at this moment gets some time for it."""
        deadline = time.monotonic() + patience_s
        now = self
        while left := now._difference(before):
            if time.monotonic() > deadline:
                return left
            time.sleep(0.05)
            now = Snapshot.take()
        return []


def _without_beds(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if not _BED.search(name))


def _processes() -> set[tuple[int, str]]:
    """Every process inside a container or a bed, and every one of Ferry's; the machine's others come and go."""
    found = set()
    own = os.readlink("/proc/self/ns/pid")
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (entry / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()[0]
            inside = os.readlink(entry / "ns/pid") != own
            if _BED.search((entry / "cgroup").read_text()):
                continue
        except OSError:
            continue
        ours = any(
            name in word for word in words[:4] for name in ("bin/runtime", "bin/migrate", "migrate.agent", "bin/criu", "criu: ")
        )
        if state != "Z" and (inside or ours):
            found.add((int(entry.name), " ".join(words)[:80]))
    return found
