"""unshare(2), setns(2), and the UTS namespace's names."""

from __future__ import annotations

import os

from runtime.linux.libc import check, libc, syscall


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for new ones, as unshare(2). Raises: OSError."""
    syscall("unshare", flags)


def setns(fd: int, flags: int) -> None:
    """Enter the namespace that `fd` refers to, as setns(2). Raises: OSError."""
    syscall("setns", fd, flags)


def sethostname(name: str) -> None:
    """Set this UTS namespace's host name, as sethostname(2). Raises: OSError."""
    raw = os.fsencode(name)
    check(libc.sethostname(raw, len(raw)), "sethostname")


def setdomainname(name: str) -> None:
    """Set this UTS namespace's NIS domain name, as setdomainname(2). Raises: OSError."""
    raw = os.fsencode(name)
    check(libc.setdomainname(raw, len(raw)), "setdomainname")
