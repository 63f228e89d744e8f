"""The terminal of a process inside a container, and stdio that must not point outside."""

from __future__ import annotations

import contextlib
import os
import stat

from runtime.linux import const, terminal
from runtime.linux.mount import mount
from runtime.process.handshake import Channel
from runtime.spec.config import Process


def attach(process: Process, channel: Channel, bind_console: bool) -> None:
    """Make a terminal in the container's devpts, send its master to the parent, and take the slave as stdio.

    Raises: OSError.
    """
    master, slave, path = terminal.open_pair("/dev/pts/ptmx", "/dev/pts")
    if process.console_size:
        terminal.set_size(slave, *process.console_size)
    os.fchown(slave, process.user.uid, -1)
    if bind_console:
        with contextlib.suppress(FileExistsError):
            os.close(os.open("/dev/console", os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        mount(path, "/dev/console", None, const.MS_BIND)
    channel.send({"console": path}, master)
    os.close(master)
    terminal.take_controlling(slave)
    for fd in range(3):
        os.dup2(slave, fd, inheritable=True)
    os.close(slave)


def reopen_null() -> None:
    """Open the container's /dev/null in place of the host's: one from outside cannot be checkpointed."""
    try:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    for fd in range(3):
        with contextlib.suppress(OSError):
            found = os.fstat(fd)
            if stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3):
                os.dup2(null, fd, inheritable=True)
    os.close(null)


def give_stdio(uid: int) -> None:
    """Let the process's user own what its stdio is, so that it can open /dev/stdout; only what root owns is given.

    /dev/null is everybody's and is left alone; a file system that has no owners is no error.
    """
    for fd in range(3):
        with contextlib.suppress(OSError):
            found = os.fstat(fd)
            null = stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)
            if not null and found.st_uid == 0 and uid != 0:
                os.fchown(fd, uid, -1)
