"""libc by ctypes, and the one place where a failed call becomes an OSError."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_int, c_long, c_ulong, c_void_p
from typing import Any

from runtime.linux.syscalls import SYSCALL

libc = ctypes.CDLL(None, use_errno=True)
libc.mount.argtypes = (c_char_p, c_char_p, c_char_p, c_ulong, c_char_p)
libc.mount.restype = c_int
libc.umount2.argtypes = (c_char_p, c_int)
libc.umount2.restype = c_int
libc.prctl.argtypes = (c_int, c_ulong, c_ulong, c_ulong, c_ulong)
libc.prctl.restype = c_int
libc.sethostname.argtypes = (c_char_p, ctypes.c_size_t)
libc.sethostname.restype = c_int
libc.setdomainname.argtypes = (c_char_p, ctypes.c_size_t)
libc.setdomainname.restype = c_int
libc.syscall.restype = c_long
libc.fallocate.argtypes = (c_int, c_int, c_long, c_long)
libc.fallocate.restype = c_int
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2

# Keeps the interpreter's lock through the call: what clone(2) needs, whose child must find the lock held.
_locked = ctypes.PyDLL(None, use_errno=True)
_locked.syscall.restype = c_long
_before_fork = ctypes.pythonapi.PyOS_BeforeFork
_after_fork_child = ctypes.pythonapi.PyOS_AfterFork_Child
_after_fork_parent = ctypes.pythonapi.PyOS_AfterFork_Parent


def check(result: int, what: str, path: str | None = None) -> int:
    """Return `result`, or raise the OSError that errno tells when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}", path)
    return result


def syscall(name: str, *args: Any) -> int:
    """Make a system call by its name; integers are passed as unsigned longs.

    Raises: OSError.
    Source: syscall(2).
    """
    converted = [c_ulong(a & 0xFFFFFFFFFFFFFFFF) if isinstance(a, int) else a for a in args]
    return check(int(libc.syscall(c_long(SYSCALL[name]), *converted)), name)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the space of a part of a file, which reads as zeros from then on. Raises: OSError. Source: fallocate(2)."""
    check(libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, length), "fallocate")


def clone(flags: int) -> int:
    """Fork into new namespaces: return 0 in the child, the child's pid in the parent.

    One call makes the child the first process of all its new namespaces and still a child of the caller, so that
    no intermediate process is left to be reaped. The caller must have a single thread.

    Raises: OSError.
    Source: clone(2); fork handlers as in CPython's os.fork.
    """
    sigchld = 17
    _before_fork()
    pid = int(_locked.syscall(c_long(SYSCALL["clone"]), c_ulong(flags | sigchld), c_void_p(), c_void_p(), c_void_p(), c_void_p()))
    if pid == 0:
        _after_fork_child()
        return 0
    number = ctypes.get_errno()
    _after_fork_parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid
