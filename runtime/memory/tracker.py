"""Which pages a process has written to since we last asked, on kernels without soft-dirty tracking.

A userfaultfd that the process opens for us write-protects its anonymous memory in the kernel's asynchronous mode: the kernel
itself takes a page's protection away at the first write to it, and PAGEMAP_SCAN lists the pages that have none and protects them
again, in one step. The process has neither a descriptor of it nor anything to wait for.

What was mapped, moved or made since the last look is not protected, and is found by that. Needs Linux 6.7.

Source: userfaultfd(2), UFFD_FEATURE_WP_ASYNC; the kernel's admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os

from runtime.linux import ptrace, userfaultfd
from runtime.linux.libc import syscall
from runtime.linux.process import pidfd_getfd, pidfd_open
from runtime.linux.procfs import number_inside, read
from runtime.linux.syscalls import MACHINE
from runtime.memory import spans
from runtime.memory.spans import Span

_CLOSE = 3 if MACHINE == "x86_64" else 57
_HUGE_BYTES = 2 << 20
_NOT_MEMORY = ("[vvar", "[vdso]", "[vsyscall]", "[uprobes]")
_GONE = (errno.ESRCH, errno.ENOENT)


def supported() -> bool:
    """Say whether this kernel and this machine can do it."""
    if not ptrace.supported():
        return False
    try:
        fd = syscall("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK | userfaultfd.USER_MODE_ONLY)
    except OSError:
        return False
    try:
        userfaultfd.api(fd, userfaultfd.WP_ASYNC)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


class Process:
    """One process whose memory is followed. Raises (constructor): OSError; it is as it was then.

    `sent` is what of its memory the other side has, and is as it is here but for what `changed` tells.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.identity = identity(pid)
        self.number = number_inside(pid)
        self.sent: list[Span] = []
        self._fds: list[int] = []
        try:
            self._uffd = _opened_by(pid)
            self._fds.append(self._uffd)
            userfaultfd.api(self._uffd, userfaultfd.WP_ASYNC)
            pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._fds.append(pagemap)
            self._scan = userfaultfd.PageScan(pagemap)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Follow it no more. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def changed(self) -> list[Span]:
        """Return what was written to, mapped or moved since the last call. Raises: OSError when the process has gone."""
        found: list[Span] = []
        for start, end in _areas(self.pid):
            try:
                found += self._written(start, end)
            except OSError as e:
                if e.errno in _GONE:
                    raise
                # Not one of those that can be followed, or unmapped by now: what of it there is at the end goes then.
                self.sent = spans.minus(self.sent, [(start, end)])
        return spans.union(found)

    def _written(self, start: int, end: int) -> list[Span]:
        try:
            found = self._scan.take_written(start, end)
        except PermissionError:
            return self._begin(start, end)
        for run in [r for r in found if r[1] - r[0] >= _HUGE_BYTES]:
            found += self._split(*run)
        return found

    def _begin(self, start: int, end: int) -> list[Span]:
        """Follow a range that is new, or has been partly replaced: the other side has nothing of it that counts."""
        self.sent = spans.minus(self.sent, [(start, end)])
        userfaultfd.protect(self._uffd, start, end)
        self._split(start, end)
        self._scan.take_written(start, end)
        # A page that was moved here may have kept its protection.
        return self._scan.filled(start, end)

    def _split(self, start: int, end: int) -> list[Span]:
        """Protect huge pages by their halves, by which the kernel makes small ones of them: else one write changes all of it."""
        found = []
        for first, last in self._scan.huge(start, end):
            at = first
            while at < last:
                cut = min(
                    at - at % _HUGE_BYTES + (_HUGE_BYTES // 2 if at % _HUGE_BYTES < _HUGE_BYTES // 2 else _HUGE_BYTES), last
                )
                found += self._scan.take_written(at, cut)
                at = cut
        return found


class Tracker:
    """Follows the memory of all processes of a container. What cannot be followed is left out; `left_out` says why."""

    def __init__(self) -> None:
        self.processes: dict[int, Process] = {}
        self.left_out: dict[int, str] = {}

    def refresh(self, pids: list[int]) -> None:
        """Follow these processes, and no others. They must be running: one that stands still takes no call for us."""
        self.keep(pids)
        self.left_out = {}
        for pid in sorted(pids):
            if pid in self.processes:
                continue
            try:
                self.processes[pid] = Process(pid)
            except OSError as e:
                self.left_out[pid] = str(e)

    def keep(self, pids: list[int]) -> None:
        """Follow only those of these processes that are followed already."""
        for pid in [p for p in self.processes if p not in pids or _identity_or_none(p) != self.processes[p].identity]:
            self.forget(pid)

    def forget(self, pid: int) -> None:
        """Follow a process no more: it has ended, or executed another program."""
        self.processes.pop(pid).close()

    def close(self) -> None:
        """Follow none any more. Idempotent."""
        for pid in list(self.processes):
            self.forget(pid)


def _opened_by(pid: int) -> int:
    """Have a process open a userfaultfd, take it, and have the process close it again. Raises: OSError."""
    pidfd = pidfd_open(pid)
    try:
        with ptrace.stopped(pid) as process:
            flags = os.O_CLOEXEC | os.O_NONBLOCK | userfaultfd.USER_MODE_ONLY
            number = process.call(userfaultfd.SYSCALL_NUMBER, flags)
            try:
                fd = pidfd_getfd(pidfd, number)
            finally:
                process.call(_CLOSE, number)
    finally:
        os.close(pidfd)
    # Whatever the process made of the call: of nothing else an ioctl of ours is to be made.
    if os.readlink(f"/proc/self/fd/{fd}") != userfaultfd.NAME:
        os.close(fd)
        raise OSError(errno.EPROTO, f"process {pid} gave something else than a userfaultfd")
    return fd


def identity(pid: int) -> tuple[str, ...]:
    """Return what tells a program in a process from the one that it executes next, and from a later process of that number.

    Raises: OSError.
    """
    fields = read(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()
    start_time, code, stack, arguments = fields[19], fields[23:25], fields[25], fields[42:46]
    return (start_time, *code, stack, *arguments, os.readlink(f"/proc/{pid}/exe"))


def _identity_or_none(pid: int) -> tuple[str, ...] | None:
    with contextlib.suppress(OSError):
        return identity(pid)
    return None


def _areas(pid: int) -> list[Span]:
    """Return the mappings of private memory that is no file's. Raises: OSError."""
    found = []
    for line in read(f"/proc/{pid}/maps").splitlines():
        fields = line.split(None, 5)
        if fields[1][3] == "p" and fields[4] == "0" and not (len(fields) > 5 and fields[5].startswith(_NOT_MEMORY)):
            start, end = (int(n, 16) for n in fields[0].split("-"))
            found.append((start, end))
    return found
