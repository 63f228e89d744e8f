"""bpf(2), as far as a cgroup's device program needs it."""

from __future__ import annotations

import ctypes
import os

from runtime.linux.libc import syscall

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 5, 8, 9, 13, 16
_ALLOW_MULTI = 2
_MAX_PROGRAMS = 64
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


class _Identity(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("rest", ctypes.c_uint8 * (_ATTR_SIZE - 4)))


class _Query(ctypes.Structure):
    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("query_flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("prog_ids", ctypes.c_uint64),
        ("prog_cnt", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * (_ATTR_SIZE - 28)),
    )


def _attached(target: int) -> list[int]:
    """Return the identities of the device programs of a cgroup."""
    identities = (ctypes.c_uint32 * _MAX_PROGRAMS)()
    query = _Query(target, _ATTACH_CGROUP_DEVICE, 0, 0, ctypes.addressof(identities), _MAX_PROGRAMS)
    syscall("bpf", _PROG_QUERY, ctypes.byref(query), ctypes.sizeof(query))
    return list(identities[: query.prog_cnt])


def attach_device_program(directory: str, program: bytes) -> None:
    """Load a CGROUP_DEVICE program and attach it to a cgroup in place of the one that is there. Raises: OSError.

    Cgroups below may have programs of their own; an access takes the consent of all.
    """
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    load = _Load(_PROG_TYPE_CGROUP_DEVICE, len(program) // 8, ctypes.addressof(code), ctypes.addressof(licence))
    prog = syscall("bpf", _PROG_LOAD, ctypes.byref(load), ctypes.sizeof(load))
    try:
        target = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            before = _attached(target)
            attach = _Attach(target, prog, _ATTACH_CGROUP_DEVICE, _ALLOW_MULTI)
            syscall("bpf", _PROG_ATTACH, ctypes.byref(attach), ctypes.sizeof(attach))
            for identity in before:
                old = syscall("bpf", _PROG_GET_FD_BY_ID, ctypes.byref(_Identity(identity)), ctypes.sizeof(_Identity))
                try:
                    detach = _Attach(target, old, _ATTACH_CGROUP_DEVICE, 0)
                    syscall("bpf", _PROG_DETACH, ctypes.byref(detach), ctypes.sizeof(detach))
                finally:
                    os.close(old)
        finally:
            os.close(target)
    finally:
        os.close(prog)
