"""System calls that another process makes for us: ptrace(2), for x86-64.

The process is stopped, its registers are pointed at a `syscall` instruction of its vdso, and it takes one step for each call.
Then it goes on where it was. What it waited for is waited for again, or, by the calls that signal(7) lists, ends with
EINTR, as when it is frozen. All of it takes well below a millisecond.

Whoever is stopped like this is not trusted: what a call "returns" is whatever the process has in its register by then.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from runtime.linux.libc import check, libc
from runtime.linux.procfs import lines, read
from runtime.linux.syscalls import MACHINE

_CONT, _SINGLESTEP, _GETREGS, _SETREGS, _DETACH = 7, 9, 12, 13, 17
_SEIZE, _INTERRUPT, _GETSIGMASK, _SETSIGMASK, _RSEQ_CONFIGURATION = 0x4206, 0x4207, 0x420A, 0x420B, 0x420F
_O_SUSPEND_SECCOMP = 1 << 21
_WALL = 0x40000000
_EVENT_STOP = 128
_USER_CS = 0x33  # of a 64-bit program
_SYSCALL = b"\x0f\x05"
_VDSO_BYTES = 1 << 16
_STOP_S = 0.5
_TRIES = 20

libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
libc.ptrace.restype = ctypes.c_long


class _Registers(ctypes.Structure):
    """user_regs_struct. Source: sys/user.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in [
            "r15",
            "r14",
            "r13",
            "r12",
            "rbp",
            "rbx",
            "r11",
            "r10",
            "r9",
            "r8",
            "rax",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "orig_rax",
            "rip",
            "cs",
            "eflags",
            "rsp",
            "ss",
            "fs_base",
            "gs_base",
            "ds",
            "es",
            "fs",
            "gs",
        ]
    )


_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_NO_SYSCALL = (1 << 64) - 1


def supported() -> bool:
    """Say whether this module knows the machine that it runs on."""
    return MACHINE == "x86_64"


class Stopped:
    """A process that stands still, to be had from `stopped`."""

    def __init__(self, pid: int, registers: _Registers, instruction: int) -> None:
        self._pid, self._registers, self._instruction = pid, registers, instruction
        self.kept_back: list[int] = []  # signals that came meanwhile

    def call(self, number: int, *arguments: int) -> int:
        """Have the process make a system call; return what it says it got. Raises: OSError as the process would see it."""
        changed = _Registers.from_buffer_copy(self._registers)
        changed.orig_rax, changed.rax, changed.rip = _NO_SYSCALL, number, self._instruction
        for name, value in zip(_ARGUMENTS, (*arguments, *(0,) * 6), strict=False):
            setattr(changed, name, value)
        _ptrace(_SETREGS, self._pid, ctypes.addressof(changed))
        for _ in range(_TRIES):
            _ptrace(_SINGLESTEP, self._pid)
            status = _wait(self._pid)
            signalled = os.WSTOPSIG(status) if status >> 16 == 0 else 0
            if signalled == signal.SIGTRAP:
                break
            # A stop for another reason came before the step: it is taken again.
            if signalled:
                self.kept_back.append(signalled)
        else:
            raise OSError(errno.EBUSY, f"process {self._pid} cannot be stepped")
        after = _Registers()
        _ptrace(_GETREGS, self._pid, ctypes.addressof(after))
        result = ctypes.c_int64(after.rax).value
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result


@contextmanager
def stopped(pid: int) -> Iterator[Stopped]:
    """Stop a process (its thread `pid`) for as long as the context lasts.

    Raises: OSError: EBUSY when it does not stop in half a second, ENOTSUP for a program that is not of this machine's kind.
    """
    _ptrace(_SEIZE, pid, 0, _O_SUSPEND_SECCOMP)
    try:
        registers = _stop(pid)
    except BaseException:
        _give_up(pid)
        raise
    mask = ctypes.create_string_buffer(8)
    masked = False
    process = None
    try:
        if registers.cs != _USER_CS:
            raise OSError(errno.ENOTSUP, f"process {pid} runs a 32-bit program")
        instruction = _instruction(pid)
        # A signal would be delivered instead of our call; the two that cannot be kept out end or stop it anyway.
        _ptrace(_GETSIGMASK, pid, 8, ctypes.addressof(mask))
        _ptrace(_SETSIGMASK, pid, 8, ctypes.addressof(ctypes.create_string_buffer(b"\xff" * 8, 8)))
        masked = True
        process = Stopped(pid, registers, instruction)
        yield process
    finally:
        _put_back(pid, registers, mask if masked else None)
        for number in process.kept_back if process else ():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _put_back(pid: int, registers: _Registers, mask: ctypes.Array[ctypes.c_char] | None) -> None:
    """Let a process go on where it was. One that runs just now, in a call that we were tired of waiting for, is stopped first.

    That takes as long as it takes: with our registers it must never go on.
    """
    while True:
        try:
            _ptrace(_SETREGS, pid, ctypes.addressof(registers))
            if mask is not None:
                _ptrace(_SETSIGMASK, pid, 8, ctypes.addressof(mask))
            _ptrace(_DETACH, pid)
            return
        except ProcessLookupError:
            if not os.path.exists(f"/proc/{pid}"):
                return  # it was killed meanwhile
        try:
            _ptrace(_INTERRUPT, pid)
            _wait(pid)
        except ProcessLookupError:
            return
        except OSError:
            continue


def _ptrace(request: int, pid: int, addr: int = 0, data: int = 0) -> None:
    # GETREGS and SETREGS take their address as data.
    if request in (_GETREGS, _SETREGS):
        addr, data = 0, addr
    check(int(libc.ptrace(request, pid, addr, data)), "ptrace")


def _wait(pid: int) -> int:
    """Wait for a stop; return its status. Raises: OSError: EBUSY when none comes, ESRCH when the process has ended."""
    deadline = time.monotonic() + _STOP_S
    while True:
        found, status = os.waitpid(pid, _WALL | os.WNOHANG)
        if found and not os.WIFSTOPPED(status):
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
        if found:
            return status
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, f"process {pid} does not stop")
        time.sleep(0.0001)


def _stop(pid: int) -> _Registers:
    """Stop a process outside of a restartable sequence, which would not be restarted. Source: rseq(2)."""
    registers = _Registers()
    for _ in range(_TRIES):
        _ptrace(_INTERRUPT, pid)
        while (status := _wait(pid)) >> 16 != _EVENT_STOP:
            # A signal that it gets just now.
            _ptrace(_CONT, pid, 0, os.WSTOPSIG(status) if status >> 16 == 0 else 0)
        _ptrace(_GETREGS, pid, ctypes.addressof(registers))
        if registers.orig_rax != _NO_SYSCALL or not _in_sequence(pid, registers.rip):
            return registers
        _ptrace(_CONT, pid)
        time.sleep(0.0005)
    raise OSError(errno.EBUSY, f"process {pid} stays in a restartable sequence")


def _in_sequence(pid: int, ip: int) -> bool:
    configuration = ctypes.create_string_buffer(24)
    try:
        _ptrace(_RSEQ_CONFIGURATION, pid, 24, ctypes.addressof(configuration))
    except OSError:
        return False  # a kernel that cannot tell; it has none, or is older than 5.13
    (area,) = struct.unpack_from("<Q", configuration)
    if not area:
        return False
    (section,) = struct.unpack("<Q", _peek(pid, area + 8, 8))
    if not section:
        return False
    start, length = struct.unpack("<QQ", _peek(pid, section + 8, 16))
    return bool(start <= ip < start + length)


def _peek(pid: int, address: int, size: int) -> bytes:
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, size, address)
    finally:
        os.close(fd)
    if len(data) != size:
        raise OSError(errno.EFAULT, f"process {pid} has no memory at {address:#x}")
    return data


def _instruction(pid: int) -> int:
    """Return the address of a `syscall` instruction. Raises: OSError."""
    for line in lines(read(f"/proc/{pid}/maps")):
        fields = line.split()
        if len(fields) == 6 and fields[4:] == ["0", "[vdso]"]:
            start, end = (int(n, 16) for n in fields[0].split("-"))
            at = _peek(pid, start, min(end - start, _VDSO_BYTES)).find(_SYSCALL)
            if at >= 0:
                return start + at
    raise OSError(errno.ENOTSUP, f"process {pid} has no vdso")


_unstopped: set[int] = set()


def _give_up(pid: int) -> None:
    """Let go of a process that has not stopped: only a stopped one can be, so `let_go` tries it again later."""
    _unstopped.add(pid)
    let_go()


def let_go() -> None:
    """Let go of those that did not stop in time, and have by now: as long as they are ours nobody else can trace them."""
    for pid in list(_unstopped):
        with suppress(OSError):
            os.waitpid(pid, _WALL | os.WNOHANG)
        try:
            _ptrace(_DETACH, pid)
        except ProcessLookupError:
            if os.path.exists(f"/proc/{pid}"):
                continue  # it has not stopped yet
        _unstopped.discard(pid)
