"""The terminal of a process inside a container, and stdio that must not point outside."""

from __future__ import annotations

import contextlib
import os
import stat

from runtime.linux import const, terminal
from runtime.linux.mount import move_mount, open_tree, openat2
from runtime.process.handshake import Channel
from runtime.spec.config import Process

_STRICT = const.RESOLVE_IN_ROOT | const.RESOLVE_NO_SYMLINKS | const.RESOLVE_NO_MAGICLINKS


def attach(process: Process, channel: Channel, bind_console: bool) -> None:
    """Make a terminal in the container's devpts, send its master to the parent, and take the slave as stdio.

    Raises: OSError.
    """
    master, slave, number = terminal.open_pair(os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    if process.console_size:
        terminal.set_size(slave, *process.console_size)
    os.fchown(slave, process.user.uid, -1)
    if bind_console:
        _bind_console(slave)
    channel.send({"console": f"/dev/pts/{number}"}, master)
    os.close(master)
    terminal.take_controlling(slave)
    for fd in range(3):
        os.dup2(slave, fd, inheritable=True)
    os.close(slave)


def _bind_console(slave: int) -> None:
    """Put the terminal on /dev/console: through descriptors, since a link there could lead to a file of /proc.

    Raises: OSError; ELOOP for a link.
    """
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileExistsError):
            directory = openat2(root, "dev", os.O_PATH | os.O_DIRECTORY, resolve=_STRICT)
            try:
                os.close(os.open("console", os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory))
            finally:
                os.close(directory)
        target = openat2(root, "dev/console", os.O_PATH | os.O_NOFOLLOW, resolve=_STRICT)
        try:
            tree = open_tree(slave, recursive=False)
            try:
                move_mount(tree, target)
            finally:
                os.close(tree)
        finally:
            os.close(target)
    finally:
        os.close(root)


def reopen_null() -> None:
    """Open the container's /dev/null in place of the host's: one from outside cannot be checkpointed."""
    try:
        null = os.open("/dev/null", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not _is_null(null):  # the container's own file of that name is no business of stdio's
            return
        os.set_blocking(null, True)
        for fd in range(3):
            with contextlib.suppress(OSError):
                if _is_null(fd):
                    os.dup2(null, fd, inheritable=True)
    finally:
        os.close(null)


def _is_null(fd: int) -> bool:
    found = os.fstat(fd)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)


def give_stdio(uid: int) -> None:
    """Let the process's user own what its stdio is, so that it can open /dev/stdout; only what root owns is given.

    /dev/null is everybody's and is left alone; a file system that has no owners is no error.
    """
    for fd in range(3):
        with contextlib.suppress(OSError):
            found = os.fstat(fd)
            if not _is_null(fd) and found.st_uid == 0 and uid != 0:
                os.fchown(fd, uid, -1)
