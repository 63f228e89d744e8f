"""The five capability sets of a process."""

from __future__ import annotations

import ctypes
from pathlib import Path

from runtime.linux import const
from runtime.linux.capability_names import NAMES, NUMBERS
from runtime.linux.libc import syscall
from runtime.linux.process import prctl


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def last_capability() -> int:
    """Return the highest capability number that the running kernel knows."""
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def bounding_set() -> frozenset[str]:
    """Return the names in this process's bounding set: no more than these can be given to a container."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapBnd:"):
            mask = int(line.split()[1], 16)
            return frozenset(name for number, name in enumerate(NAMES) if mask >> number & 1)
    return frozenset()


def permitted_set() -> frozenset[str]:
    """Return the names in this process's permitted set. Raises: OSError. Source: capget(2)."""
    data = (_Data * 2)()
    syscall("capget", ctypes.byref(_Header(const.LINUX_CAPABILITY_VERSION_3, 0)), ctypes.byref(data))
    mask = data[0].permitted | data[1].permitted << 32
    return frozenset(name for number, name in enumerate(NAMES) if mask >> number & 1)


def drop_bounding(keep: frozenset[str], last: int) -> None:
    """Drop every capability up to number `last` but those of `keep` from the bounding set. Source: PR_CAPBSET_DROP."""
    for number in range(last + 1):
        if number >= len(NAMES) or NAMES[number] not in keep:
            prctl(const.PR_CAPBSET_DROP, number)


def capset(effective: frozenset[str], permitted: frozenset[str], inheritable: frozenset[str]) -> None:
    """Set this thread's three classic sets, as capset(2). Raises: OSError."""

    def mask(names: frozenset[str]) -> int:
        return sum(1 << NUMBERS[n] for n in names)

    e, p, i = mask(effective), mask(permitted), mask(inheritable)
    data = (_Data * 2)(
        _Data(e & 0xFFFFFFFF, p & 0xFFFFFFFF, i & 0xFFFFFFFF),
        _Data(e >> 32, p >> 32, i >> 32),
    )
    syscall("capset", ctypes.byref(_Header(const.LINUX_CAPABILITY_VERSION_3, 0)), ctypes.byref(data))


def set_ambient(names: frozenset[str]) -> None:
    """Make the ambient set exactly `names`, each of which must be permitted and inheritable. Raises: OSError."""
    prctl(const.PR_CAP_AMBIENT, const.PR_CAP_AMBIENT_CLEAR_ALL)
    for name in sorted(names):
        prctl(const.PR_CAP_AMBIENT, const.PR_CAP_AMBIENT_RAISE, NUMBERS[name])
