"""Pseudo-terminals: opening a pair inside the container's devpts, and sending a master over a console socket."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
import struct
import termios

from runtime.linux.const import TIOCGPTN, TIOCGPTPEER, TIOCSPTLCK


def open_pair(ptmx: int) -> tuple[int, int, int]:
    """Open a new pair by a descriptor of ptmx: master, slave, and the number of the slave.

    The slave comes from the master, not from a path, which could lead anywhere.

    Raises: OSError. Source: pts(4), ioctl_tty(2).
    """
    found = os.fstat(ptmx)
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != os.makedev(5, 2):
        raise OSError(errno.ENODEV, "/dev/pts/ptmx is not the kernel's: mount a devpts on /dev/pts")
    fcntl.ioctl(ptmx, TIOCSPTLCK, struct.pack("i", 0))
    number = struct.unpack("i", fcntl.ioctl(ptmx, TIOCGPTN, struct.pack("i", 0)))[0]
    slave = fcntl.ioctl(ptmx, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    return ptmx, slave, number


def set_size(fd: int, rows: int, columns: int) -> None:
    """Set a terminal's size in characters. Source: TIOCSWINSZ."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def copy_size(source_fd: int, target_fd: int) -> None:
    """Give one terminal the size of another."""
    fcntl.ioctl(target_fd, termios.TIOCSWINSZ, fcntl.ioctl(source_fd, termios.TIOCGWINSZ, b"\0" * 8))


def take_controlling(fd: int) -> None:
    """Make terminal `fd` the controlling terminal of the session that this process leads. Raises: OSError."""
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def send_master(console_socket: str, master: int, name: str) -> None:
    """Send a terminal's master to whoever listens on a unix socket, as runc's `--console-socket` does.

    Raises: OSError.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.connect(console_socket)
        s.sendmsg([name.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))])
