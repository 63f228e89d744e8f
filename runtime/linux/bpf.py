"""bpf(2), as far as a cgroup's device program needs it."""

from __future__ import annotations

import ctypes
import os

from runtime.linux.libc import syscall

_PROG_LOAD, _PROG_ATTACH = 5, 8
_PROG_TYPE_CGROUP_DEVICE, _ATTACH_CGROUP_DEVICE = 15, 6
_ATTR_SIZE = 128


class _Load(ctypes.Structure):
    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("rest", ctypes.c_uint8 * (_ATTR_SIZE - 24)),
    )


class _Attach(ctypes.Structure):
    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("attach_bpf_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * (_ATTR_SIZE - 16)),
    )


def attach_device_program(directory: str, program: bytes) -> None:
    """Load a CGROUP_DEVICE program and attach it to a cgroup, which then keeps it. Raises: OSError."""
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    load = _Load(_PROG_TYPE_CGROUP_DEVICE, len(program) // 8, ctypes.addressof(code), ctypes.addressof(licence))
    prog = syscall("bpf", _PROG_LOAD, ctypes.byref(load), ctypes.sizeof(load))
    try:
        target = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            attach = _Attach(target, prog, _ATTACH_CGROUP_DEVICE, 0)
            syscall("bpf", _PROG_ATTACH, ctypes.byref(attach), ctypes.sizeof(attach))
        finally:
            os.close(target)
    finally:
        os.close(prog)
