"""mount(2), umount2(2), pivot_root(2), and opens that stay beneath a directory."""

from __future__ import annotations

import ctypes
import os

from runtime.linux.const import RESOLVE_IN_ROOT
from runtime.linux.libc import check, libc, syscall


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)


def mount(source: str | None, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """Mount, remount, or change propagation, as mount(2). Raises: OSError naming `target`."""
    check(libc.mount(_bytes(source), os.fsencode(target), _bytes(fstype), flags, _bytes(data)), "mount", target)


def umount2(target: str, flags: int = 0) -> None:
    """Unmount, as umount2(2). Raises: OSError naming `target`."""
    check(libc.umount2(os.fsencode(target), flags), "umount2", target)


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root mount of this mount namespace, as pivot_root(2). Raises: OSError."""
    syscall("pivot_root", os.fsencode(new_root), os.fsencode(put_old))


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(dir_fd: int, path: str, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """Open `path` below a directory; by default links and `..` are resolved as if that directory were `/`.

    Raises: OSError. Source: openat2(2).
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    try:
        return syscall("openat2", dir_fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    except OSError as e:
        raise OSError(e.errno, f"openat2: {os.strerror(e.errno or 0)}", path) from None
