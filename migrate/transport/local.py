"""An agent, or an `ssh` that leads to one, as a child process with pipes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable

from migrate.errors import ConnectionLost

# An agent that lets go of a dump under way waits for its end.
_LET_GO_S = 660.0


class FdStream:
    """A stream over two file descriptors.

    Units: `timeout_s` bounds each wait for bytes; None waits for ever. Then `patient`, if there is one, says whether to go on.
    """

    def __init__(self, read_fd: int, write_fd: int, name: str) -> None:
        self._read_fd, self._write_fd, self._name = read_fd, write_fd, name
        self._closed = False
        self.timeout_s: float | None = None
        self.patient: Callable[[], bool] | None = None
        self._poll = select.poll()
        self._poll.register(read_fd, select.POLLIN)
        for fd in (read_fd, write_fd):
            enlarge(fd)

    @property
    def fds(self) -> tuple[int, int]:
        return self._read_fd, self._write_fd

    def read_into(self, buffer: memoryview) -> None:
        while buffer:
            buffer = buffer[self.read_some(buffer) :]

    def read_some(self, buffer: memoryview) -> int:
        """Read what is there, waiting for at least one byte. Raises: ConnectionLost at the end, and when time is over."""
        while self.timeout_s is not None and not self._poll.poll(self.timeout_s * 1000):
            if self.patient is not None and self.patient():
                continue
            raise ConnectionLost(f"{self._name} did not answer in {self.timeout_s:.0f} s")
        try:
            count = os.readv(self._read_fd, [buffer])
        except OSError as e:
            raise ConnectionLost(f"connection to {self._name} is lost: {e.strerror}") from e
        if count == 0:
            raise ConnectionLost(f"connection to {self._name} is lost: it was closed there")
        return count

    def noise(self) -> str:
        """Return what the other side said beside the stream, for an error."""
        return ""

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._write_fd, view) :]
            except OSError as e:
                raise ConnectionLost(f"connection to {self._name} is lost: {e.strerror}") from e

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for fd in {self._read_fd, self._write_fd}:
            with contextlib.suppress(OSError):
                os.close(fd)

    def forsake(self) -> None:
        """Close our descriptors, and leave the stream to whoever else has them."""
        FdStream.close(self)


class ProcessStream(FdStream):
    """A child process whose stdin and stdout are the stream."""

    def __init__(self, argv: list[str], name: str, env: dict[str, str] | None = None) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=env,
                start_new_session=True,
            )
        except OSError as e:
            raise ConnectionLost(f"cannot start {argv[0]}: {e.strerror}") from e
        assert self.process.stdin and self.process.stdout
        # Our own descriptors: those of the Popen objects close when they are collected.
        super().__init__(os.dup(self.process.stdout.fileno()), os.dup(self.process.stdin.fileno()), name)
        self.process.stdin.close()
        self.process.stdout.close()

    def noise(self) -> str:
        """Return what the process wrote on stderr."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)
        self._stderr.seek(0)
        return self._stderr.read(4000).decode(errors="replace")

    def forsake(self) -> None:
        """Close our ends of the pipes, and leave the process to whoever else has them."""
        super().close()

    def close(self) -> None:
        """Close the pipes, and see the process end: an agent lets go of everything at EOF."""
        super().close()
        try:
            self.process.wait(timeout=_LET_GO_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stderr.close()


def enlarge(fd: int) -> None:
    """Make a pipe as large as an ordinary user may, so that the two ends wait for each other less often."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)


def local_agent() -> ProcessStream:
    """Start an agent on this host. Raises: ConnectionLost."""
    return ProcessStream([sys.executable, "-m", "migrate.agent"], "the agent on this host")
