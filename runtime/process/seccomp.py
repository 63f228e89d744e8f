"""seccomp filters: compiled by libseccomp in the verb, loaded by seccomp(2) in the container's process.

libseccomp is called by ctypes: its Python module is built for one interpreter of the distribution's, and is not ours.
"""

from __future__ import annotations

import ctypes
import os
import struct
from ctypes import c_int, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

from runtime.errors import ContainerError, Unsupported
from runtime.linux.libc import syscall
from runtime.linux.syscalls import MACHINE
from runtime.spec.seccomp import Argument, Rule, Seccomp
from runtime.values import Value

_ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_NOTIFY": 0x7FC00000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_OPERATORS = {
    "SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4, "SCMP_CMP_GE": 5, "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}  # fmt: skip
_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 32,
}
_NEW_LISTENER = 8
# AUDIT_ARCH_*, by libseccomp's name of the architecture (include/uapi/linux/audit.h); x32 shares x86_64's.
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_EPERM, _ENOSYS = 1, 38
_MAX_INSTRUCTIONS = 4096


class Filter(Value):
    """A compiled filter: instructions of struct sock_filter, and the flags of seccomp(2)."""

    bpf: bytes
    flags: int
    listener_path: str | None
    listener_metadata: str
    allows_execveat: bool

    def loader(self) -> Loader:
        """Return it ready to be loaded."""
        return Loader(self)

    @property
    def listens(self) -> bool:
        return bool(self.flags & _NEW_LISTENER)


class _Compare(ctypes.Structure):
    _fields_ = (("arg", c_uint), ("op", c_int), ("a", c_uint64), ("b", c_uint64))


def _library() -> Any:
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
    except OSError as e:
        raise Unsupported("/linux/seccomp: libseccomp.so.2 is not installed", hint="apt install libseccomp2") from e
    lib.seccomp_init.restype = c_void_p
    lib.seccomp_init.argtypes = (c_uint32,)
    lib.seccomp_release.argtypes = (c_void_p,)
    lib.seccomp_release.restype = None
    lib.seccomp_arch_resolve_name.restype = c_uint32
    lib.seccomp_arch_resolve_name.argtypes = (ctypes.c_char_p,)
    lib.seccomp_arch_native.restype = c_uint32
    lib.seccomp_arch_add.argtypes = (c_void_p, c_uint32)
    lib.seccomp_attr_set.argtypes = (c_void_p, c_uint32, c_uint32)
    lib.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
    lib.seccomp_syscall_resolve_name_arch.argtypes = (c_uint32, ctypes.c_char_p)
    lib.seccomp_rule_add_array.argtypes = (c_void_p, c_uint32, c_int, c_uint, c_void_p)
    lib.seccomp_export_bpf.argtypes = (c_void_p, c_int)
    return lib


def _action(name: str, errno_: int | None, at: str) -> int:
    value = _ACTIONS[name]
    if name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        return value | (_EPERM if errno_ is None else errno_)
    if errno_ is not None:
        raise ContainerError(f"{at}: {name} takes no errno")
    return value


def build(s: Seccomp) -> Filter:
    """Compile a filter. A system call that this libseccomp does not know is skipped, as every runtime does.

    Raises: Unsupported without libseccomp; ContainerError naming the JSON pointer.
    """
    lib = _library()
    default = _action(s.default_action, s.default_errno, "/linux/seccomp/defaultErrnoRet")
    context = lib.seccomp_init(default)
    if not context:
        raise Unsupported(f"/linux/seccomp/defaultAction: this libseccomp does not know {s.default_action}")
    try:
        if "SECCOMP_FILTER_FLAG_LOG" in s.flags:
            lib.seccomp_attr_set(context, 6, 1)
        names = [a.removeprefix("SCMP_ARCH_").lower() for a in s.architectures]
        for i, name in enumerate(names):
            token = lib.seccomp_arch_resolve_name(name.encode())
            if not token:
                raise Unsupported(f"/linux/seccomp/architectures/{i}: this libseccomp does not know {name}")
            status = lib.seccomp_arch_add(context, token)
            if status not in (0, -17):  # EEXIST: the native one is there from the start
                raise ContainerError(f"/linux/seccomp/architectures/{i}: {os.strerror(-status)}")
        for i, rule in enumerate(s.rules):
            _add(lib, context, rule, default, f"/linux/seccomp/syscalls/{i}")
        bpf = _export(lib, context)
    finally:
        lib.seccomp_release(context)
    bpf = _unknown_calls(lib, s, names) + bpf
    if len(bpf) // 8 > _MAX_INSTRUCTIONS:
        raise ContainerError(f"/linux/seccomp: the filter has {len(bpf) // 8} instructions, the kernel takes {_MAX_INSTRUCTIONS}")
    flags = sum(_FLAGS[f] for f in set(s.flags))
    if any(r.action == "SCMP_ACT_NOTIFY" for r in s.rules):
        # A listener cannot be had together with TSYNC, which means nothing to a single thread.
        flags = flags & ~_FLAGS["SECCOMP_FILTER_FLAG_TSYNC"] | _NEW_LISTENER
    else:
        flags &= ~_FLAGS["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]
    return Filter(bpf, flags, s.listener_path, s.listener_metadata, _allows(s, "execveat"))


def _allows(s: Seccomp, name: str) -> bool:
    rules = [r for r in s.rules if name in r.names]
    return all(r.action == "SCMP_ACT_ALLOW" and not r.arguments for r in rules) if rules else s.default_action == "SCMP_ACT_ALLOW"


def _add(lib: Any, context: int, rule: Rule, default: int, at: str) -> None:
    action = _action(rule.action, rule.errno, f"{at}/errnoRet")
    if action == default:
        return
    for name in rule.names:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number == -1:
            continue
        for comparisons in _alternatives(rule.arguments):
            array = (_Compare * max(1, len(comparisons)))(
                *(_Compare(c.index, _OPERATORS[c.operator], c.value, c.value_two) for c in comparisons)
            )
            status = lib.seccomp_rule_add_array(context, action, number, len(comparisons), array)
            if status not in (0, -17):
                raise ContainerError(f"{at}: libseccomp refuses the rule for {name}: {os.strerror(-status)}")


def _alternatives(arguments: tuple[Argument, ...]) -> list[tuple[Argument, ...]]:
    """Comparisons of one rule must all hold; several of the same argument mean, by custom, any of them."""
    if len({a.index for a in arguments}) == len(arguments):
        return [arguments]
    return [(a,) for a in arguments]


def _export(lib: Any, context: int) -> bytes:
    fd = os.memfd_create("seccomp", 1)
    try:
        status = lib.seccomp_export_bpf(context, fd)
        if status:
            raise ContainerError(f"/linux/seccomp: libseccomp cannot compile the filter: {os.strerror(-status)}")
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def _unknown_calls(lib: Any, s: Seccomp, names: list[str]) -> bytes:
    """Return instructions that answer ENOSYS to calls newer than all that the profile names.

    A profile that denies by default with EPERM cannot know them, and libraries fall back to older calls on ENOSYS only.
    """
    if s.default_action != "SCMP_ACT_ERRNO" or s.default_errno == _ENOSYS:
        return b""
    native = {"x86_64": "x86_64", "aarch64": "aarch64"}.get(MACHINE)
    if native is None:
        return b""
    token = lib.seccomp_arch_resolve_name(native.encode())
    known = [lib.seccomp_syscall_resolve_name_arch(token, n.encode()) for r in s.rules for n in r.names]
    highest = max((k for k in known if k >= 0), default=-1)
    if highest < 0:
        return b""
    load, jeq, jgt, jge, ret = 0x20, 0x15, 0x25, 0x35, 0x06

    def instruction(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, true, false, k)

    return b"".join(
        [
            instruction(load, 4),
            instruction(jeq, _AUDIT[native], 0, 4),
            instruction(load, 0),
            instruction(jge, _X32_BIT, 2, 0),
            instruction(jgt, highest, 0, 1),
            instruction(ret, _ACTIONS["SCMP_ACT_ERRNO"] | _ENOSYS),
        ]
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", c_void_p))


class Loader:
    """A filter ready to be loaded with one system call."""

    def __init__(self, found: Filter) -> None:
        self._code = ctypes.create_string_buffer(found.bpf, len(found.bpf))
        self._program = _Program(len(found.bpf) // 8, ctypes.addressof(self._code))
        self._reference = ctypes.byref(self._program)
        self._flags = found.flags

    def load(self) -> int:
        """Load it; return the listener's descriptor where the filter notifies. Raises: OSError."""
        set_mode_filter = 1
        return syscall("seccomp", set_mode_filter, self._flags, self._reference)
