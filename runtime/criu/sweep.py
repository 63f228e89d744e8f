"""Undo what CRIU did to a container's network, when CRIU itself can no longer do it.

A CRIU that is killed in the middle of a dump leaves the container mute. Its TCP sockets are in repair mode, in which a program
that reads gets an error. And packets are kept out: by a table `inet CRIU-ID` of nftables, ID being that of a run of CRIU, or by
chains named CRIU of iptables, which let only packets with CRIU's own mark pass. They are in the container's network namespace,
which may be the host's or a pod's: what was there before a dump is not ours to remove.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator

from runtime.linux import const, namespace
from runtime.linux.process import pidfd_getfd, pidfd_open

_TCP_REPAIR = 19  # tcp(7) does not name it; linux/tcp.h does
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_IPTABLES = ("iptables", "ip6tables")


def locks(pid: int) -> frozenset[str]:
    """Return the locks in the network namespace of a process; none where that cannot be told."""
    with contextlib.suppress(OSError, subprocess.SubprocessError), _network_of(pid):
        return frozenset(_locks())
    return frozenset()


def sweep(init: int, pids: list[int], known: frozenset[str]) -> None:
    """Undo all of it but the locks that were there before; the processes must not run. Idempotent; never raises."""
    with contextlib.suppress(OSError, subprocess.SubprocessError), _network_of(init):
        for lock in sorted(set(_locks()) - known):
            _remove(lock)
    for pid in pids:
        _leave_repair(pid)


@contextlib.contextmanager
def _network_of(pid: int) -> Iterator[None]:
    """Be in the network namespace of a process. Raises: OSError."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespace.setns(there, const.CLONE_NEWNET)
        finally:
            os.close(there)
        try:
            yield
        finally:
            namespace.setns(before, const.CLONE_NEWNET)
    finally:
        os.close(before)


def _locks() -> Iterator[str]:
    for line in (_run("nft", "list", "tables") or "").splitlines():
        words = line.split()  # table FAMILY NAME
        if len(words) == 3 and words[2].startswith("CRIU-"):
            yield f"nft {words[1]} {words[2]}"
    for command in _IPTABLES:
        if _run(command, "-w", "-n", "-L", "CRIU") is not None:
            yield command


def _remove(lock: str) -> None:
    if lock.startswith("nft "):
        _run("nft", "delete", "table", *lock.split()[1:])
        return
    for chain in ("INPUT", "OUTPUT"):
        _run(lock, "-w", "-D", chain, "-j", "CRIU")
    _run(lock, "-w", "-F", "CRIU")
    _run(lock, "-w", "-X", "CRIU")


def _run(*argv: str) -> str | None:
    """Run a command; return what it printed, None where it is not there or failed."""
    path = shutil.which(argv[0], path=_PATH)
    if path is None:
        return None
    done = subprocess.run([path, *argv[1:]], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _leave_repair(pid: int) -> None:
    with contextlib.suppress(OSError):
        process = pidfd_open(pid)
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                        with socket.socket(fileno=pidfd_getfd(process, int(name))) as s:
                            if s.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR):
                                s.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 0)
        finally:
            os.close(process)
