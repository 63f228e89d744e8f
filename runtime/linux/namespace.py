"""unshare(2), setns(2), who owns a namespace, and the UTS namespace's names."""

from __future__ import annotations

import fcntl
import os

from runtime.linux.libc import check, libc, syscall

_NS_GET_USERNS = 0xB701


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for new ones, as unshare(2). Raises: OSError."""
    syscall("unshare", flags)


def setns(fd: int, flags: int) -> None:
    """Enter the namespace that `fd` refers to, as setns(2). Raises: OSError."""
    syscall("setns", fd, flags)


def owner(path: str) -> int:
    """Return the inode of the user namespace that owns a namespace. Raises: OSError. Source: ioctl_ns(2)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        users = fcntl.ioctl(fd, _NS_GET_USERNS)
        try:
            return os.fstat(users).st_ino
        finally:
            os.close(users)
    finally:
        os.close(fd)


def sethostname(name: str) -> None:
    """Set this UTS namespace's host name, as sethostname(2). Raises: OSError."""
    raw = os.fsencode(name)
    check(libc.sethostname(raw, len(raw)), "sethostname")


def setdomainname(name: str) -> None:
    """Set this UTS namespace's NIS domain name, as setdomainname(2). Raises: OSError."""
    raw = os.fsencode(name)
    check(libc.setdomainname(raw, len(raw)), "setdomainname")
