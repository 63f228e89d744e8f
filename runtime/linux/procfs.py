"""What the files below /proc say. Pure: text in, values out; the readers at the end open the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runtime.values import Value


class Mount(Value):
    """One line of /proc/PID/mountinfo. Source: proc(5)."""

    mount_id: int
    parent_id: int
    device: str  # major:minor
    root: str
    mount_point: str
    options: str
    optional: tuple[str, ...]
    fstype: str
    source: str
    super_options: str


def _unescape(text: str) -> str:
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse the text of a mountinfo file."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        f, g = left.split(" "), right.split(" ")
        mounts.append(
            Mount(int(f[0]), int(f[1]), f[2], _unescape(f[3]), _unescape(f[4]), f[5], tuple(f[6:]), g[0], _unescape(g[1]), g[2])
        )
    return mounts


def parse_cgroup(text: str) -> dict[str, str]:
    """Parse /proc/PID/cgroup: controller (or `name=x`, or "" for v2) -> path. Source: cgroups(7)."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


class Stat(Value):
    """The fields of /proc/PID/stat that identify a process and say whether it lives. Units: clock ticks since boot."""

    pid: int
    state: str
    ppid: int
    start_time: int


def parse_stat(text: str) -> Stat:
    """Parse /proc/PID/stat; the command's name may hold anything, so fields count from the last `)`."""
    fields = text[text.rindex(")") + 2 :].split()
    return Stat(int(text.split(" ", 1)[0]), fields[0], int(fields[1]), int(fields[19]))


def lines(text: str) -> list[str]:
    """Split a file of /proc at its line ends alone: processes choose names with whatever else str.splitlines() splits at."""
    return text.removesuffix("\n").split("\n") if text else []


def mappings(pid: int) -> Iterator[tuple[int, int, str, int, str, int, str]]:
    """Give what a process has mapped: start, end, permissions, offset, device, inode, name; nothing of one that has ended.

    Raises: OSError. Source: proc_pid_maps(5).
    """
    for line in lines(read(f"/proc/{pid}/maps")):
        place, permissions, offset, device, inode, *name = line.split(None, 5)
        start, _, end = place.partition("-")
        yield int(start, 16), int(end, 16), permissions, int(offset, 16), device, int(inode), name[0] if name else ""


def number_inside(pid: int) -> int:
    """Return the number of a process in its own pid namespace. Raises: OSError."""
    for line in lines(read(f"/proc/{pid}/status")):
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return pid


def read(path: str | Path) -> str:
    """Read a file below /proc. Names in it are whatever programs chose: bytes that are no text become escapes.

    Raises: OSError.
    """
    return Path(path).read_bytes().decode(errors="backslashreplace")


def read_stat(pid: int) -> Stat | None:
    """Return the process's Stat, or None when there is no such process."""
    try:
        return parse_stat(read(f"/proc/{pid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def read_mountinfo(pid: int | str = "self") -> list[Mount]:
    """Return the mounts that a process sees. Raises: OSError."""
    return parse_mountinfo(read(f"/proc/{pid}/mountinfo"))


def read_cgroup(pid: int | str = "self") -> dict[str, str]:
    """Return a process's cgroup paths. Raises: OSError."""
    return parse_cgroup(read(f"/proc/{pid}/cgroup"))


def has_pending(pid: int, number: int) -> bool:
    """Say whether a signal waits for a process, or that it has ended. Source: proc(5), SigPnd and ShdPnd."""
    try:
        lines = read(f"/proc/{pid}/status").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
