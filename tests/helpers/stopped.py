"""A command of `migrate` that stops itself at an entry of the journal, for a test to break something meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.helpers.bed import Bed


class Stopped:
    """`at` is PHASE.MARK:before or :after; `ended` is true when the command was over before it got there."""

    def __init__(self, bed: Bed, host: str, at: str, *command: str, env: tuple[str, ...] = ()) -> None:
        # A ^C means what it does at a prompt, also where the tests themselves run in the background.
        argv = bed.argv(host, "env", "--default-signal=INT", f"FERRY_FAULT={at}", *env, *command)
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.pid = 0
        deadline = time.monotonic() + 60
        while not (self._waits() and self._find(at)):
            if self._process.poll() is not None:
                break
            assert time.monotonic() < deadline, f"it does not get to {at}"
            time.sleep(0.02)

    @property
    def ended(self) -> bool:
        return self.pid == 0

    def _waits(self) -> bool:
        """Say whether the nsenter around the command has stopped, which it does when its child has."""
        return _is_stopped(self._process.pid)

    def _is_it(self, pid: int) -> bool:
        return _is_stopped(pid)

    def _find(self, at: str) -> bool:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                ours = f"FERRY_FAULT={at}".encode() in (entry / "environ").read_bytes().split(b"\0")
                inside = any(word.endswith(b"bin/migrate") for word in words[:2])
                if ours and inside and self._is_it(int(entry.name)) and _below(int(entry.name), self._process.pid):
                    self.pid = int(entry.name)
            except OSError:
                continue
        return self.pid != 0

    def signal(self, number: int) -> None:
        assert self.pid, "it has ended"
        if self._process.poll() is None:
            os.kill(self.pid, number)

    def go_on(self, timeout_s: float = 120) -> tuple[int, str, str]:
        """Let it go on; return its status and what it said."""
        for pid in (self._process.pid, self.pid):
            if pid:
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    continue
        out, err = self._process.communicate(timeout=timeout_s)
        return self._process.returncode, out, err


class Running(Stopped):
    """A command of `migrate` that goes on, to be struck at any moment: it never gets to where it would stop."""

    def __init__(self, bed: Bed, host: str, *command: str, env: tuple[str, ...] = ()) -> None:
        super().__init__(bed, host, "never.reached:before", *command, env=env)

    def _waits(self) -> bool:
        return True

    def _is_it(self, pid: int) -> bool:
        return True


def _is_stopped(pid: int) -> bool:
    try:
        return ") T " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return False
