"""System calls that another process makes for us: ptrace(2), for x86-64.

The process is stopped, its registers are pointed at a `syscall` instruction of its vdso, and it takes one step for each call.
Then it goes on where it was; what it waited for is waited for again by the kernel. All of it takes well below a millisecond.

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
from runtime.linux.syscalls import MACHINE

_CONT, _SINGLESTEP, _GETREGS, _SETREGS, _DETACH = 7, 9, 12, 13, 17
_SEIZE, _INTERRUPT, _GETSIGMASK, _SETSIGMASK, _RSEQ_CONFIGURATION = 0x4206, 0x4207, 0x420A, 0x420B, 0x420F
_O_SUSPEND_SECCOMP = 1 << 21
_WALL = 0x40000000
_EVENT_STOP = 128
_USER_CS = 0x33  # of a 64-bit program
_SYSCALL = b"\x0f\x05"
_STOP_S, _GIVE_UP_S = 0.5, 5.0
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
            # A stop for another reason came before the step: it is taken again.
            if os.WSTOPSIG(status) == signal.SIGTRAP and status >> 16 == 0:
                break
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
    try:
        if registers.cs != _USER_CS:
            raise OSError(errno.ENOTSUP, f"process {pid} runs a 32-bit program")
        instruction = _instruction(pid)
        # A signal would be delivered instead of our call; the two that cannot be kept out end or stop it anyway.
        _ptrace(_GETSIGMASK, pid, 8, ctypes.addressof(mask))
        _ptrace(_SETSIGMASK, pid, 8, ctypes.addressof(ctypes.create_string_buffer(b"\xff" * 8, 8)))
        masked = True
        yield Stopped(pid, registers, instruction)
    finally:
        try:
            _ptrace(_SETREGS, pid, ctypes.addressof(registers))
            if masked:
                _ptrace(_SETSIGMASK, pid, 8, ctypes.addressof(mask))
            _ptrace(_DETACH, pid)
        except ProcessLookupError:
            pass  # it was killed meanwhile


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
        _wait(pid)
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
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if line.rstrip().endswith("[vdso]"):
                start, end = (int(n, 16) for n in line.split()[0].split("-"))
                at = _peek(pid, start, end - start).find(_SYSCALL)
                if at >= 0:
                    return start + at
    raise OSError(errno.ENOTSUP, f"process {pid} has no vdso")


def _give_up(pid: int) -> None:
    """Let go of a process that did not stop in time. Only a stopped one can be, so it gets some time more.

    One that does not stop even then stays ours until we end: whoever wants to trace it meanwhile cannot.
    """
    deadline = time.monotonic() + _GIVE_UP_S
    while time.monotonic() < deadline:
        try:
            _ptrace(_DETACH, pid)
            return
        except OSError:
            with suppress(OSError):
                _wait(pid)
