"""What a container's processes have mapped and open. Reads only: asked also while it stands still."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from migrate.manifest import Inode


def family(init_pid: int) -> list[Path]:
    """Return the /proc directories of the processes in a container's cgroups, its first process's and those below.

    Asked while the container stands still, when starting a command would be the longest part of it.
    """
    try:
        own = Path(f"/proc/{init_pid}/cgroup").read_text().splitlines()
    except OSError:
        return []  # it has just ended
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            lines = (entry / "cgroup").read_text(errors="replace").splitlines()
        except OSError:
            continue
        if len(lines) == len(own) and all(a == b or a.startswith(f"{b}/") for a, b in zip(lines, own, strict=True)):
            found.append(entry)
    return found


def written(members: list[Path]) -> tuple[set[Inode], set[Inode]]:
    """Return the files that a container's processes may write to: by a shared mapping, and by an open descriptor."""
    mapped: set[Inode] = set()
    opened: set[Inode] = set()
    for process in members:
        with contextlib.suppress(OSError):
            mapped |= _shared_mappings(process)
        with contextlib.suppress(OSError):
            opened |= _open_for_writing(process)
    return mapped, opened


def _shared_mappings(process: Path) -> set[Inode]:
    """Return every file that a process has mapped shared and writable. Raises: OSError."""
    found = set()
    for _, permissions, device, inode, _ in _mappings(process):
        if permissions[1] == "w" and permissions[3] == "s" and inode:
            major, minor = (int(n, 16) for n in device.split(":"))
            found.add((os.makedev(major, minor), inode))
    return found


def mapped_names(members: list[Path], device: int) -> set[bytes] | None:
    """Return what of a file system a container's processes have mapped shared and writable: paths in it, without a /.

    None when that is not known of all of it: a name may be gone while the file has another one.
    """
    where = f"{os.major(device):02x}:{os.minor(device):02x}"
    found = set()
    for process in members:
        try:
            for place, permissions, on, inode, _ in _mappings(process):
                if on == where and permissions[1] == "w" and permissions[3] == "s" and inode:
                    start, end = (f"{int(n, 16):x}" for n in place.split("-"))
                    found.add(os.readlink(os.fsencode(process / f"map_files/{start}-{end}")))
        except (FileNotFoundError, ProcessLookupError):
            if process.exists():
                return None
        except OSError:
            return None
    return None if any(name.endswith(b" (deleted)") for name in found) else {name.lstrip(b"/") for name in found}


def _mappings(process: Path) -> Iterator[tuple[str, str, str, int, str]]:
    """Give what a process has mapped: range, permissions, device, inode, name. Raises: OSError."""
    # Names may have whatever else str.splitlines() splits at.
    for line in (process / "maps").read_text(errors="replace").split("\n"):
        if line:
            place, permissions, _, device, inode, *name = line.split(None, 5)
            yield place, permissions, device, int(inode), name[0] if name else ""


def _open_for_writing(process: Path) -> set[Inode]:
    """Return every regular file that a process has open for writing. Raises: OSError."""
    found = set()
    for entry in list(os.scandir(process / "fd")):
        with contextlib.suppress(OSError):
            st = entry.stat()
            if not stat.S_ISREG(st.st_mode):
                continue
            lines = (process / "fdinfo" / entry.name).read_text().splitlines()
            flags = next((int(line.split()[1], 8) for line in lines if line.startswith("flags:")), os.O_RDWR)
            if flags & os.O_ACCMODE != os.O_RDONLY:
                found.add((st.st_dev, st.st_ino))
    return found


def shared_bytes(pids: Iterable[int]) -> int:
    """Return how much memory processes share that is no file's, in bytes."""
    found: dict[tuple[str, int], int] = {}
    for process in (Path(f"/proc/{pid}") for pid in pids):
        with contextlib.suppress(OSError):
            for place, permissions, device, inode, name in _mappings(process):
                if permissions[3] == "s" and name.startswith(("/dev/zero (", "/SYSV", "/memfd:")):
                    start, end = (f"{int(n, 16):x}" for n in place.split("-"))  # map_files has no leading zeros
                    with contextlib.suppress(FileNotFoundError):  # unmapped meanwhile
                        found[device, inode] = os.stat(process / f"map_files/{start}-{end}").st_blocks * 512
    return sum(found.values())


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
