"""systemd's two conventions: sockets that the caller passes on (LISTEN_FDS), and readiness that is reported (NOTIFY_SOCKET).

Source: sd_listen_fds(3), sd_notify(3).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path

from runtime.errors import KernelError
from runtime.linux.process import pidfd_open
from runtime.spec.config import Mount, Process, Spec
from runtime.values import replace

_INSIDE = "/run/notify"


def listen_fds() -> int:
    """Return how many sockets the caller passed to this very process, from descriptor 3 on."""
    count, pid = os.environ.get("LISTEN_FDS", ""), os.environ.get("LISTEN_PID", "")
    return int(count) if count.isdigit() and pid == str(os.getpid()) else 0


def with_listen_fds(process: Process, count: int) -> Process:
    """Tell the container's first process about its sockets; it is pid 1 in its pid namespace."""
    if not count:
        return process
    names = [f"LISTEN_FDNAMES={os.environ['LISTEN_FDNAMES']}"] if "LISTEN_FDNAMES" in os.environ else []
    return replace(process, env=(*process.env, f"LISTEN_FDS={count}", "LISTEN_PID=1", *names))


class NotifySocket:
    """A socket in the container's state directory that is mounted inside; what arrives there is passed on."""

    def __init__(self, state_dir: Path, host_socket: str) -> None:
        self._directory, self._host = state_dir / "notify", host_socket

    @classmethod
    def of_caller(cls, state_dir: Path) -> NotifySocket | None:
        """Return the one that this verb's caller wants, None when it waits for nothing."""
        host_socket = os.environ.get("NOTIFY_SOCKET")
        return cls(state_dir, host_socket) if host_socket else None

    def inside(self, spec: Spec) -> Spec:
        """Return the spec with the socket mounted and named in the environment. Pure."""
        mount = Mount(_INSIDE, "bind", str(self._directory), ("bind", "nosuid", "noexec", "nodev", "ro"))
        process = spec.process
        if process is not None:
            process = replace(process, env=(*process.env, f"NOTIFY_SOCKET={_INSIDE}/notify.sock"))
        return replace(spec, mounts=(*spec.mounts, mount), process=process)

    def make(self) -> None:
        """Make the socket's directory. Raises: OSError."""
        self._directory.mkdir(mode=0o755)

    def listen(self) -> socket.socket:
        """Make the socket. Raises: KernelError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        directory = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            path = f"/proc/self/fd/{directory}/notify.sock"
            listener.bind(path)
            os.chmod(path, 0o777)  # the container's user is not ours
        except OSError as e:
            raise KernelError(f"cannot make {self._directory}/notify.sock", e.errno or 0) from e
        finally:
            os.close(directory)
        return listener

    def relay(self, listener: socket.socket, pid: int) -> None:
        """Wait until the container says READY=1, pass that on with its pid on this host; or until it ends."""
        pidfd = pidfd_open(pid)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        try:
            while True:
                for fd, _ in poll.poll():
                    if fd == pidfd:
                        return
                    # Only that it is ready: any other word of a container's could have systemd do something.
                    if b"READY=1" in listener.recv(4096).split(b"\n"):
                        self._tell(pid)
                        return
        finally:
            os.close(pidfd)

    def _tell(self, pid: int) -> None:
        address = "\0" + self._host[1:] if self._host.startswith("@") else self._host
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.connect(address)
            s.send(f"READY=1\nMAINPID={pid}".encode())
