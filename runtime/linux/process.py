"""Processes: prctl(2), pidfds, and the closing of what was inherited."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

from runtime.linux import const
from runtime.linux.libc import check, clone, libc, syscall

__all__ = [
    "KCMP_FILE",
    "KCMP_VM",
    "clone",
    "close_from",
    "die_with_parent",
    "kcmp",
    "new_session_keyring",
    "no_new_privs",
    "pidfd_getfd",
    "pidfd_open",
    "pidfd_send_signal",
    "prctl",
    "reset_signals",
    "set_name",
    "spare_from_oom",
]


KCMP_FILE, KCMP_VM = 0, 1


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """Control this process, as prctl(2). Raises: OSError."""
    return check(libc.prctl(option, arg2, arg3, arg4, arg5), "prctl")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Source: PR_SET_PDEATHSIG."""
    prctl(const.PR_SET_PDEATHSIG, signal.SIGKILL)


def no_new_privs() -> None:
    """Give up gaining privileges by execve, for good. Source: PR_SET_NO_NEW_PRIVS."""
    prctl(const.PR_SET_NO_NEW_PRIVS, 1)


def set_name(name: str) -> None:
    """Set what `ps -o comm` shows of this thread, at most 15 bytes. Source: PR_SET_NAME."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    prctl(const.PR_SET_NAME, ctypes.addressof(buffer))


def spare_from_oom() -> None:
    """Have the kernel kill any other process first when memory runs out, as far as we may. Source: proc_pid_oom_score_adj(5)."""
    for score in ("-1000", "0"):
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
            f.write(score)
            f.flush()
            return


def pidfd_open(pid: int) -> int:
    """Return a file descriptor that means this very process, not a later one of its number. Raises: OSError."""
    return syscall("pidfd_open", pid, 0)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """Return a duplicate of another process's descriptor. Raises: OSError (EBADF, EPERM). Source: pidfd_getfd(2)."""
    fd = syscall("pidfd_getfd", pidfd, number, 0)
    os.set_inheritable(fd, False)
    return fd


def kcmp(first: int, second: int, kind: int, first_fd: int = 0, second_fd: int = 0) -> bool:
    """Say whether two processes have the same memory (KCMP_VM), or the same open file (KCMP_FILE) under these descriptors.

    Raises: OSError. Source: kcmp(2).
    """
    return syscall("kcmp", first, second, kind, first_fd, second_fd) == 0


def pidfd_send_signal(pidfd: int, number: int) -> None:
    """Send a signal to the process that `pidfd` means. Raises: OSError (ESRCH when it has ended)."""
    syscall("pidfd_send_signal", pidfd, number, None, 0)


def new_session_keyring(name: str) -> None:
    """Join a new session keyring, so that the container does not see its caller's keys.

    Raises: OSError; ENOSYS and EPERM mean a kernel or a filter without keyrings. Source: keyctl(2).
    """
    join_session_keyring = 1
    syscall("keyctl", join_session_keyring, os.fsencode(name))


def close_from(first: int) -> None:
    """Mark every descriptor from `first` on close-on-exec. Source: close_range(2)."""
    close_range_cloexec = 4
    syscall("close_range", first, 0xFFFFFFFF, close_range_cloexec)


def reset_signals() -> None:
    """Give every signal its default action and unblock all: execve passes on what Python ignores (SIGPIPE, SIGXFSZ)."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    # The two that glibc keeps to itself are hidden from Python, but may have come to us ignored all the same.
    default_action = ctypes.create_string_buffer(32)
    for hidden in (32, 33):
        syscall("rt_sigaction", hidden, default_action, None, 8)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class _SchedAttr(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


_POLICIES = {
    "SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_ISO": 4, "SCHED_IDLE": 5, "SCHED_DEADLINE": 6,
}  # fmt: skip
_SCHEDULER_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}


def sched_setattr(
    policy: str, flags: tuple[str, ...], nice: int, priority: int, runtime_ns: int, deadline_ns: int, period_ns: int
) -> None:
    """Set this thread's scheduling, as sched_setattr(2). Raises: OSError."""
    bits = sum(_SCHEDULER_FLAGS[f] for f in set(flags))
    attr = _SchedAttr(
        ctypes.sizeof(_SchedAttr), _POLICIES[policy], bits, nice, priority, runtime_ns, deadline_ns, period_ns
    )  # fmt: skip
    syscall("sched_setattr", 0, ctypes.byref(attr), 0)


def ioprio_set(io_class: str, priority: int) -> None:
    """Set this thread's I/O priority, as ioprio_set(2). Raises: OSError."""
    number = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}[io_class]
    who_process = 1
    syscall("ioprio_set", who_process, 0, number << 13 | priority)


def personality(domain: str) -> None:
    """Set this process's execution domain, as personality(2). Raises: OSError."""
    syscall("personality", {"LINUX": 0, "LINUX32": 8}[domain])
