"""A tiny static program that stands between us and the container's program. Its bytes are pure; `execute` acts.

What a process executes could be a script or an ELF file whose interpreter is `/proc/self/exe`: executed by us, that
would run our own interpreter's file inside the container, and whoever runs it can open it, wait, and overwrite the
host's Python (CVE-2019-5736). So we first execute this stub out of a sealed memory file. From then on
/proc/self/exe is the stub, which nobody can change, and the stub executes the container's program:

    fcntl(error_fd, F_SETFD, FD_CLOEXEC)        or close(error_fd) where that is not allowed
    seccomp(SET_MODE_FILTER, flags, &filter)    where there is one
    execve(path, argv, envp)                    its own argv and envp
    write(error_fd, &errno, 4); exit_group(126)

It also loads the seccomp filter, where that can be done so late, so that no call of ours is subject to it.

    +0 u32 error_fd | +4 u32 has a filter | +8 u32 filter flags | +16 struct sock_fprog | +32 path, NUL | filter

Source: elf(5), execveat(2), memfd_create(2), seccomp(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from runtime.linux.const import AT_EMPTY_PATH
from runtime.linux.libc import syscall
from runtime.linux.syscalls import MACHINE

_CODE = {
    "x86_64": (
        62,
        "488d1d690000008b3b6a025e6a015a6a48580f0585c074078b3b6a03580f05837b040074156a015f8b7308488d5310b83d0100000f0585c0"
        "7517488b0c24488d742408488d54ce08488d7b206a3b580f05f7d8508b3b4889e66a045a6a01580f056a7e5fb8e70000000f050f1f440000",
    ),
    "aarch64": (
        183,
        "93040010600240b9410080d2220080d2280380d2010000d4800000b4600240b9280780d2010000d4690640b9e9000034200080d2610a40b9"
        "62420091a82280d2010000d4000100b5e90340f9e1230091220c098b4220009160820091a81b80d2010000d4e003004be00f1ff8600240b9"
        "e1030091820080d2080880d2010000d4c00f80d2c80b80d2010000d41f2003d5",
    ),
}
_BASE, _HEADERS = 0x400000, 64 + 56
SUPPORTED = MACHINE in _CODE


def image(path: str, error_fd: int, bpf: bytes, bpf_flags: int, machine: str) -> bytes:
    """Return the stub as an ELF file that executes `path`, after it loaded the filter `bpf` unless that is empty."""
    elf_machine, code_hex = _CODE[machine]
    code = bytes.fromhex(code_hex)
    name = os.fsencode(path) + b"\0"
    name += b"\0" * (-len(name) % 8)
    data = _BASE + _HEADERS + len(code)
    body = code + struct.pack("<IIIIHHIQ", error_fd, bool(bpf), bpf_flags, 0, len(bpf) // 8, 0, 0, data + 32 + len(name))
    body += name + bpf
    size = _HEADERS + len(body)
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, elf_machine, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load, read_execute, page = 1, 5, 0x1000
    header += struct.pack("<IIQQQQQQ", load, read_execute, 0, _BASE, _BASE, size, size, page)
    return header + body


def make(path: str, error_fd: int, bpf: bytes = b"", bpf_flags: int = 0) -> int | None:
    """Return a descriptor of the sealed stub; None where the kernel lets no memory file be executed."""
    if not SUPPORTED:
        return None
    cloexec, allow_sealing, executable = 1, 2, 0x10
    try:
        fd = os.memfd_create("runtime-exec", cloexec | allow_sealing | executable)
    except OSError as e:
        if e.errno != errno.EINVAL:  # before Linux 6.3 there was no such flag, and all could be executed
            return None
        fd = os.memfd_create("runtime-exec", cloexec | allow_sealing)
    os.write(fd, image(path, error_fd, bpf, bpf_flags, MACHINE))
    seal_all = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal_all)
    return fd


class Vector:
    """argv and envp as execve wants them, made before a filter may forbid what making them takes."""

    def __init__(self, args: tuple[str, ...], env: list[str]) -> None:
        self.argv = _strings([os.fsencode(a) for a in args])
        self.envp = _strings([os.fsencode(e) for e in env])


def _strings(items: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(items) + 1))(*items, None)


def execute(stub: int, vector: Vector) -> None:
    """Become the stub. Raises: OSError."""
    syscall("execveat", stub, b"", vector.argv, vector.envp, AT_EMPTY_PATH)
