"""Which pages a process has written to since we last asked, on kernels without soft-dirty tracking.

A userfaultfd that the process opens for us write-protects its anonymous memory in the kernel's asynchronous mode: the kernel
itself takes a page's protection away at the first write to it, and PAGEMAP_SCAN lists the pages that have none and protects them
again, in one step. The process keeps no descriptor of it, and has nothing to wait for.

What was mapped, moved or made since the last look is not protected, and is found by that. Needs Linux 6.7.

Source: userfaultfd(2), UFFD_FEATURE_WP_ASYNC; the kernel's admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os

from runtime.linux import ptrace, userfaultfd
from runtime.linux.libc import syscall
from runtime.linux.process import KCMP_VM, kcmp, pidfd_getfd, pidfd_open
from runtime.linux.procfs import lines, mappings, number_inside, read
from runtime.linux.syscalls import MACHINE
from runtime.memory import spans
from runtime.memory.spans import Span

_CLOSE = 3 if MACHINE == "x86_64" else 57
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
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            self._fds.append(self._pagemap)
            self._scan = userfaultfd.PageScan(self._pagemap)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Follow it no more. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def changed(self) -> list[Span]:
        """Return what was written to, mapped or moved since the last call. Raises: OSError when the process has gone."""
        self._require_there()
        found: list[Span] = []
        for start, end in _areas(self.pid):
            try:
                found += self._written(start, end)
            except OSError as e:
                if e.errno in _GONE:
                    raise
                # Not one of those that can be followed, or unmapped by now: what of it there is at the end goes then.
                self.sent = spans.minus(self.sent, [(start, end)])
        self._require_there()
        return spans.union(found)

    def _require_there(self) -> None:
        """See that the memory that we look at is a process's still: of one that it left by execve nothing ever changes."""
        if not os.pread(self._pagemap, 8, 0):
            raise ProcessLookupError(errno.ESRCH, f"process {self.pid} has another memory by now")

    def _written(self, start: int, end: int) -> list[Span]:
        try:
            return self._scan.take_written(start, end)
        except PermissionError:
            pass
        # New, or partly replaced: the other side has nothing of it that counts. A page that was moved here may have kept a
        # protection that no write takes away any more: letting go of the range clears those.
        self.sent = spans.minus(self.sent, [(start, end)])
        userfaultfd.protect(self._uffd, start, end)
        userfaultfd.unregister(self._uffd, start, end)
        userfaultfd.protect(self._uffd, start, end)
        return self._scan.take_written(start, end)


class Tracker:
    """Follows the memory of all processes of a container. What cannot be followed is left out; `left_out` says why."""

    def __init__(self) -> None:
        self.processes: dict[int, Process] = {}
        self.left_out: dict[int, str] = {}

    def refresh(self, pids: list[int]) -> None:
        """Follow these processes, and no others. They must be running: one that stands still takes no call for us."""
        self.keep(pids)
        for pid in [p for p in self.processes if writes_unseen(p)]:
            self.forget(pid)
        self.left_out = {}
        for pid in sorted(pids):
            if pid in self.processes:
                continue
            try:
                if reason := self._reason_against(pid):
                    self.left_out[pid] = reason
                    continue
                process = Process(pid)
            except OSError as e:
                self.left_out[pid] = str(e)
                continue
            if process.number in (p.number for p in self.processes.values()):
                process.close()
                self.left_out[pid] = f"another process has its number {process.number}"
            else:
                self.processes[pid] = process

    def _reason_against(self, pid: int) -> str:
        if any(kcmp(pid, other, KCMP_VM) for other in self.processes):
            # Two that follow one memory would take each other's changes.
            return "it shares its memory with another process, as between vfork and execve"
        return writes_unseen(pid)

    def keep(self, pids: list[int]) -> None:
        """Follow only those of these processes that are followed already."""
        ptrace.let_go()
        for pid in list(self.processes):
            if pid not in pids or _identity_or_none(pid) != self.processes[pid].identity:
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


def writes_unseen(pid: int) -> str:
    """Say why a process's memory may change without a write of a processor; "" when it does not.

    A device that reads straight into it (O_DIRECT, aio) was let in before the page was protected.
    """
    try:
        for name in os.listdir(f"/proc/{pid}/fdinfo"):
            with contextlib.suppress(FileNotFoundError):
                for line in lines(read(f"/proc/{pid}/fdinfo/{name}")):
                    if line.startswith("flags:") and int(line.split()[1], 8) & os.O_DIRECT:
                        return "it has files open with O_DIRECT, whose reads do not show as writes to memory"
        if any(line.endswith("/[aio] (deleted)") for line in lines(read(f"/proc/{pid}/maps"))):
            return "it uses asynchronous I/O, which does not show as writes to memory"
    except OSError:
        return ""
    return ""


def _identity_or_none(pid: int) -> tuple[str, ...] | None:
    with contextlib.suppress(OSError):
        return identity(pid)
    return None


def _areas(pid: int) -> list[Span]:
    """Return the mappings of private memory that is no file's. Raises: OSError."""
    return [
        (start, end)
        for start, end, permissions, _, _, inode, name in mappings(pid)
        if permissions[3] == "p" and not inode and not name.startswith(_NOT_MEMORY)
    ]
