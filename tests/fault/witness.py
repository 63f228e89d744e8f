"""Tells a test what the host holds that it runs on: a line on stdin asks, a line of JSON answers. One process for many questions."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrate import records
from runtime.container.container import Container
from runtime.container.store import Store, default_root
from runtime.errors import NotFound

# The journals of moves are kept on purpose, and sshd's own files are no move's.
KEPT = ("/var/lib/ferry/migrations", "/run/sshd")


def containers() -> dict[str, str]:
    """Return the status of each container."""
    store, found = Store(default_root()), {}
    for container in store.ids():
        with contextlib.suppress(NotFound):
            found[container] = str(Container(store, container).document()["status"])
    return found


def unfinished() -> list[dict[str, Any]]:
    """Return the moves that are not over."""
    return [record.as_dict() for record in records.unfinished()]


def inventory() -> dict[str, list[str]]:
    """Return mounts, cgroups, firewall rules and links, network namespaces, and files where a move makes some."""
    files = []
    for top in ("/run", "/tmp", "/var/lib/ferry"):
        for base, directories, names in os.walk(top):
            directories[:] = [d for d in directories if not f"{base}/{d}".startswith(KEPT)]
            files += [f"{base}/{name}" for name in directories + names if not f"{base}/{name}".startswith(KEPT)]
    netns = Path("/run/netns")
    # A host that boots has the mounts of this machine, those of other beds and tests among them.
    inherited = {line.split()[0] for line in Path(sys.argv[1]).read_text().splitlines()}
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {
        "MOUNTS": [fields[4] for fields in mounts if fields[0] not in inherited],
        "CGROUPS": [
            f"{base}/{d}" for base, directories, _ in os.walk("/sys/fs/cgroup") for d in directories if base.count("/") > 3
        ],
        "RULES": [
            *_lines("nft", "list", "ruleset"),
            *(line.split("@")[0].split()[0] for line in _lines("ip", "-o", "-br", "link")),
        ],
        "NETNS": [f.name for f in netns.iterdir()] if netns.exists() else [],
        "FILES": files,
    }


def _lines(*argv: str) -> list[str]:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()


QUESTIONS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (containers, unfinished, inventory)}

if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(QUESTIONS[line.strip()]()), flush=True)
