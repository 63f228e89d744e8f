"""Look at a running container from outside, for `findings`: its processes, what they have open, its mounts. Reads only."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator

from runtime.criu.findings import OpenFile, Socket, Task
from runtime.linux import const, namespace, sockdiag
from runtime.linux.mount import openat2
from runtime.linux.process import pidfd_getfd, pidfd_open
from runtime.linux.procfs import lines, read, read_stat

_SO_PROTOCOL, _SO_DOMAIN = 38, 39


def is_being_filled(pid: int) -> bool:
    """Say whether pages of a process are still to come: its memory is registered with a userfaultfd for missing ones.

    Source: proc_pid_smaps(5), VmFlags.
    """
    try:
        text = read(f"/proc/{pid}/smaps")
    except OSError:
        return False
    return any(" um" in line for line in lines(text) if line.startswith("VmFlags:"))


def family(init_pid: int, cgroup_pids: list[int]) -> list[tuple[int, bool]]:
    """Return the container's processes: those below its first one, and those that are only in its cgroups (False)."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (found := read_stat(int(entry))) is not None:
            parents[found.pid] = found.ppid
    below = {init_pid}
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in below} - below
        below |= more
        grown = bool(more)
    return [(p, True) for p in sorted(below)] + [(p, False) for p in sorted(set(cgroup_pids) - below) if p in parents]


def tasks(members: list[tuple[int, bool]]) -> Iterator[Task]:
    """Look at each process; one that has ended meanwhile is left out."""
    for pid, below in members:
        with contextlib.suppress(OSError, KeyError, StopIteration):
            status = _fields(f"/proc/{pid}/status")
            state = status["State"].split()[0]
            maps = "" if state in "ZX" else read(f"/proc/{pid}/maps")
            yield Task(
                pid=pid,
                name=status["Name"],
                state=state,
                tracer=int(status["TracerPid"]),
                below_init=below,
                namespaces={} if state in "ZX" else _namespaces(pid),
                label=_label(pid),
                has_uprobes="[uprobes]" in maps,
                has_sysv_memory="/SYSV" in maps,
                other_user=state not in "ZX" and _is_other_user(pid, status),
            )


def _fields(path: str) -> dict[str, str]:
    return {k: v.strip() for k, _, v in (line.partition(":") for line in read(path).splitlines())}


def _is_other_user(pid: int, status: dict[str, str]) -> bool:
    """Say whether prlimit(2) on a process takes CAP_SYS_RESOURCE in our own user namespace."""
    if os.stat(f"/proc/{pid}/ns/user").st_ino != os.stat("/proc/self/ns/user").st_ino:
        return False
    ids = {int(n) for n in status["Uid"].split()[:3]}, {int(n) for n in status["Gid"].split()[:3]}
    return ids != ({os.getuid()}, {os.getgid()})


def _namespaces(pid: int) -> dict[str, int]:
    return {kind: os.stat(f"/proc/{pid}/ns/{file}").st_ino for kind, (_, file) in const.NAMESPACES.items()}


def _label(pid: int) -> str:
    try:
        return read(f"/proc/{pid}/attr/current").rstrip("\0\n")
    except OSError:
        return ""


def files(pid: int) -> Iterator[OpenFile]:
    """Look at a process's descriptors, sockets apart, and at its mappings of deleted files."""
    try:
        numbers = sorted(int(n) for n in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return
    for number in numbers:
        with contextlib.suppress(OSError):
            target = _printable(os.readlink(f"/proc/{pid}/fd/{number}"))
            if not target.startswith("socket:["):
                yield _file(pid, number, target)
    with contextlib.suppress(OSError):
        yield from deleted_maps(pid)


def _printable(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


def _file(pid: int, number: int, target: str) -> OpenFile:
    found = os.stat(f"/proc/{pid}/fd/{number}")
    locks, watched, flags = 0, [], 0
    for line in read(f"/proc/{pid}/fdinfo/{number}").splitlines():
        if line.startswith("lock:"):
            locks += 1
        elif line.startswith("flags:"):
            flags = int(line.split()[1], 8)
        elif line.startswith(("inotify ", "fanotify ino:")):
            device = int(dict(p.split(":", 1) for p in line.split()[1:] if ":" in p)["sdev"], 16)
            watched.append((device >> 20, device & 0xFFFFF))
    access = flags & os.O_ACCMODE
    return OpenFile(
        pid=pid,
        number=number,
        target=target,
        mode=found.st_mode,
        links=found.st_nlink,
        size=found.st_size,
        rdev=(os.major(found.st_rdev), os.minor(found.st_rdev)),
        device=(os.major(found.st_dev), os.minor(found.st_dev)),
        inode=found.st_ino,
        writable=access in (os.O_WRONLY, os.O_RDWR),
        readable=access in (os.O_RDONLY, os.O_RDWR),
        locks=locks,
        watched_devices=tuple(watched),
    )


def message_queues(pid: int, places: list[str]) -> Iterator[str]:
    """Return what is in a process's mqueue file systems; whatever the container has put on the way there is not followed out."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for place in places:
            with contextlib.suppress(OSError):
                fd = openat2(root, place, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    yield from sorted(_printable(f"/{name}") for name in os.listdir(fd))
                finally:
                    os.close(fd)
    finally:
        os.close(root)


def deleted_maps(pid: int) -> Iterator[OpenFile]:
    """Look at the mappings of files that have lost their name. Raises: OSError."""
    for line in read(f"/proc/{pid}/maps").splitlines():
        if line.endswith(" (deleted)"):
            fields = line.split(None, 5)
            with contextlib.suppress(OSError):
                found = os.stat(f"/proc/{pid}/map_files/{fields[0]}")
                yield OpenFile(pid, -1, fields[5], mode=found.st_mode, links=found.st_nlink, size=found.st_size)


def ghost_bytes(pids: list[int]) -> int:
    """Return the size of the largest deleted file that processes have open or mapped."""
    largest = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{number}").endswith(" (deleted)"):
                        found = os.stat(f"/proc/{pid}/fd/{number}")
                        largest = max(largest, found.st_size if stat.S_ISREG(found.st_mode) else 0)
            largest = max([largest, *(f.size for f in deleted_maps(pid))])
    return largest


def sockets(pids: list[int]) -> Iterator[Socket]:
    """Look at the sockets of processes of one container; each is borrowed for a moment to ask what it is."""
    held: list[tuple[int, int, int]] = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/{pid}/fd/{name}")
                    if target.startswith("socket:["):
                        held.append((pid, int(name), int(target[8:-1])))
    inside = {inode for _, _, inode in held}
    known = _unix_sockets(pids[0]) if held else {}
    # Who is connected, but not accepted yet, is known by whoever listens.
    waiting = {client for inode in inside & known.keys() for client in known[inode].waiting}
    for pid, number, inode in held:
        with contextlib.suppress(OSError):
            found = known.get(inode)
            outside = found is not None and found.connected and found.peer not in inside and inode not in waiting
            yield _socket(pid, number, inode, outside, outside and found is not None and found.peer in known)


def _socket(pid: int, number: int, inode: int, peer_outside: bool, peer_seen: bool) -> Socket:
    process = pidfd_open(pid)
    try:
        fd = pidfd_getfd(process, number)
    finally:
        os.close(process)
    with socket.socket(fileno=fd) as s:
        address_family = s.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
        kind = s.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        protocol = s.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL)
        state, name = 0, ""
        if kind == socket.SOCK_STREAM and address_family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                (state,) = struct.unpack_from("B", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8))
        with contextlib.suppress(OSError):
            name = _name(s.getsockname())
        with contextlib.suppress(OSError):
            peer = _name(s.getpeername())
            name = f"{name} - {peer}" if name and peer else name or peer
    return Socket(pid, number, inode, address_family, kind, protocol, state, name, peer_outside, peer_seen)


def _name(address: object) -> str:
    if isinstance(address, tuple):
        return f"{address[0]}:{address[1]}" if len(address) >= 2 else str(address)
    if isinstance(address, bytes):
        return "@" + address.lstrip(b"\0").decode(errors="backslashreplace")
    return _printable(str(address or ""))


def _unix_sockets(pid: int) -> dict[int, sockdiag.UnixSocket]:
    """Return the unix sockets in a process's network namespace by inode; none where the kernel does not tell."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespace.setns(there, const.CLONE_NEWNET)
        finally:
            os.close(there)
        try:
            return sockdiag.unix_sockets()
        finally:
            namespace.setns(before, const.CLONE_NEWNET)
    except OSError:
        return {}
    finally:
        os.close(before)
