"""Reading a container's cgroups from outside, on v1, hybrid and v2 hosts."""

from __future__ import annotations

from pathlib import Path

from runtime.linux.procfs import read_cgroup

ROOT = Path("/sys/fs/cgroup")


def v2_only() -> bool:
    return (ROOT / "cgroup.controllers").exists()


def read(pid: int, v1: str, v2: str) -> str:
    """Return the text of a process's cgroup file: `v1` is CONTROLLER/FILE, `v2` is FILE."""
    paths = read_cgroup(pid)
    if v2_only():
        return (ROOT / paths[""].lstrip("/") / v2).read_text().strip()
    controller, file = v1.split("/")
    mounted = next(d for d in ROOT.iterdir() if controller in d.name.split(","))
    return (mounted / paths[controller].lstrip("/") / file).read_text().strip()
