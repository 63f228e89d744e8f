"""Numbers of system calls that glibc has no wrapper for, on the machine that we run on."""

from __future__ import annotations

import os

# As it is now: a process that takes on another personality sees another.
MACHINE = os.uname().machine

# System calls without a wrapper in glibc 2.36, by machine; those from 424 on have one number everywhere.
_X86_64 = {
    "clone": 56,
    "pivot_root": 155,
    "capget": 125,
    "capset": 126,
    "setns": 308,
    "unshare": 272,
    "keyctl": 250,
    "bpf": 321,
    "rt_sigaction": 13,
    "personality": 135,
    "ioprio_set": 251,
    "sched_setattr": 314,
    "seccomp": 317,
    "execveat": 322,
    "process_vm_readv": 310,
    "kcmp": 312,
    "userfaultfd": 323,
}
_ARM64 = {
    "clone": 220,
    "pivot_root": 41,
    "capget": 90,
    "capset": 91,
    "setns": 268,
    "unshare": 97,
    "keyctl": 219,
    "bpf": 280,
    "rt_sigaction": 134,
    "personality": 92,
    "ioprio_set": 30,
    "sched_setattr": 274,
    "seccomp": 277,
    "execveat": 281,
    "process_vm_readv": 270,
    "kcmp": 272,
    "userfaultfd": 282,
}
SYSCALL: dict[str, int] = {
    **(_X86_64 if MACHINE == "x86_64" else _ARM64),
    "pidfd_send_signal": 424,
    "open_tree": 428,
    "move_mount": 429,
    "pidfd_open": 434,
    "close_range": 436,
    "openat2": 437,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
}
