"""What is mounted on this host, and what a path is on. Reads only."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple


class Mount(NamedTuple):
    """`options` are the file system's own, as the kernel escapes them, `root` is what of it is mounted, `device` its number."""

    point: str
    kind: str
    options: str
    source: str
    root: str
    device: str


def all_mounts() -> list[Mount]:
    """Return all mounts, in order."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        (_, _, device, root, point, *_), fields = left.split(" "), right.split(" ")
        found.append(Mount(unescaped(point), fields[0], fields[-1], fields[1], unescaped(root), device))
    return found


def unescaped(text: str) -> str:
    """Undo how the kernel writes spaces, commas and the like in mountinfo. Source: seq_file.c, mangle_path and seq_escape."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _mount_of(path: str | Path) -> Mount | None:
    """Return what a path is on: the last mount over its nearest mount point."""
    real = os.path.realpath(path)
    best = None
    for mount in all_mounts():
        if real == mount.point or real.startswith(mount.point.rstrip("/") + "/"):
            best = mount if best is None or len(mount.point) >= len(best.point) else best
    return best


def filesystem(path: Path) -> str:
    """Return the name of the file system that a path is on."""
    mount = _mount_of(path)
    return "" if mount is None else mount.kind


def below(directory: Path) -> list[str]:
    """Return the mount points strictly below a directory."""
    prefix = os.path.realpath(directory).rstrip("/") + "/"
    return sorted(m.point for m in all_mounts() if m.point.startswith(prefix))


# Of these the mount's source names the same storage on every host.
_OF_NETWORKS = {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "beegfs", "gpfs", "fuse.glusterfs", "fuse.ceph", "fuse.sshfs"}


def storage(path: str) -> str:
    """Return what tells a directory of a network's file system from all others, on any host; "" for one of another kind."""
    mount = _mount_of(path)
    if mount is None or mount.kind not in _OF_NETWORKS:
        return ""
    inside = os.path.relpath(os.path.realpath(path), mount.point)
    try:
        return json.dumps([mount.kind, mount.source, os.path.normpath(f"{mount.root}/{inside}"), os.stat(path).st_ino])
    except OSError:
        return ""
