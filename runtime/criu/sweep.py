"""Undo what CRIU did to a container's network, when CRIU itself can no longer do it.

A CRIU that is killed in the middle of a dump leaves the container mute. Its TCP sockets are in repair mode, in which a program
that reads gets an error. And packets are kept out: by a table `inet CRIU-PID` of nftables, or chains named CRIU of iptables,
which let only packets with CRIU's own mark pass. With a network namespace of its own all of that is in there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable

from runtime.linux import const, namespace
from runtime.linux.process import pidfd_getfd, pidfd_open

_TCP_REPAIR = 19  # tcp(7) does not name it; linux/tcp.h does
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def sweep(init: int, pids: list[int]) -> None:
    """Undo all of it, before the processes run. Idempotent; never raises."""
    _network_lock(init)
    for pid in pids:
        _leave_repair(pid)


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


def _network_lock(pid: int) -> None:
    """Remove what CRIU left in the network namespace of a process. Idempotent; never raises."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
            # Locked connection by connection; the table bears the number of the process.
            _nft(lambda table: table == f"CRIU-{pid}")
            return
        before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespace.setns(there, const.CLONE_NEWNET)
            try:
                _nft(lambda table: table.startswith("CRIU-"))
                _iptables()
            finally:
                namespace.setns(before, const.CLONE_NEWNET)
        finally:
            os.close(before)
            os.close(there)


def _run(*argv: str) -> str | None:
    """Run a command; return what it printed, None where it is not there or failed."""
    path = shutil.which(argv[0], path=_PATH)
    if path is None:
        return None
    done = subprocess.run([path, *argv[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout if done.returncode == 0 else None


def _nft(is_ours: Callable[[str], bool]) -> None:
    for line in (_run("nft", "list", "tables") or "").splitlines():
        words = line.split()  # table FAMILY NAME
        if len(words) == 3 and is_ours(words[2]):
            _run("nft", "delete", "table", words[1], words[2])


def _iptables() -> None:
    for command in ("iptables", "ip6tables"):
        if _run(command, "-w", "-n", "-L", "CRIU") is None:
            continue
        for chain in ("INPUT", "OUTPUT"):
            _run(command, "-w", "-D", chain, "-j", "CRIU")
        _run(command, "-w", "-F", "CRIU")
        _run(command, "-w", "-X", "CRIU")
