"""Stand between a container and its caller: pass signals in, relay the terminal, wait, and tell the exit status."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from typing import Any

from runtime.files import write_all
from runtime.linux import terminal

# What the kernel sends about ourselves, or what is handled here.
_NOT_FORWARDED = {signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}


class Foreground:
    """Catches signals from the moment it is made, so that none is lost before `wait`."""

    def __init__(self) -> None:
        self._wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, _noted)
        self._master: int | None = None
        self._stdin_open = True

    def take_master(self, master: int) -> None:
        """Relay this terminal's master to our stdio."""
        self._master = master
        if os.isatty(0):
            with contextlib.suppress(OSError):
                terminal.copy_size(0, master)

    def wait(self, pid: int) -> int:
        """Wait for a child; return its exit status, or 128 + the signal that ended it."""
        restore = termios.tcgetattr(0) if self._master is not None and os.isatty(0) else None
        if restore is not None:
            tty.setraw(0)
        try:
            return self._loop(pid)
        finally:
            if restore is not None:
                termios.tcsetattr(0, termios.TCSADRAIN, restore)

    def _loop(self, pid: int) -> int:
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        if self._master is not None:
            poll.register(self._master, select.POLLIN)
            poll.register(0, select.POLLIN)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self._drain()
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            for fd, events in poll.poll():
                if fd == self._wake_read:
                    self._pass_signals(pid)
                elif fd == self._master:
                    if not self._copy(self._master, 1):
                        poll.unregister(fd)
                elif fd == 0 and self._master is not None and not self._copy(0, self._master):
                    poll.unregister(0)
                    if not events & select.POLLIN and os.isatty(0):
                        self._stdin_open = False

    def _pass_signals(self, pid: int) -> None:
        for number in os.read(self._wake_read, 512):
            if number == signal.SIGWINCH and self._master is not None:
                with contextlib.suppress(OSError):
                    terminal.copy_size(0, self._master)
            elif number not in _NOT_FORWARDED:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _copy(self, source: int, target: int) -> bool:
        """Copy what is there; return False at the end. EIO is how a master says that no slave is open."""
        try:
            data = os.read(source, 65536)
            if not data:
                return False
            write_all(target, data)
        except OSError:
            return False
        return True

    def _drain(self) -> None:
        """Copy what the process wrote last."""
        while self._master is not None and select.select([self._master], [], [], 0)[0]:
            if not self._copy(self._master, 1):
                break
        sys.stdout.flush()


def _noted(number: int, frame: Any) -> None:
    """Have the signal reach the wake-up descriptor instead of its default action."""
