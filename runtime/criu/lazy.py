"""A restore whose memory follows: a daemon gives each page when it is touched, and all others meanwhile.

    verb ---- socket ---- supervisor ---- child: the daemon, criu lazy-pages or our own (runtime/memory/filler.py)
     | <-------- ready | error ---+          reads the images here, or fetches from a page server
     | restore; processes send their userfaultfds to the daemon
     | -- restored PID ---------->+          holds the userfaultfds, too, until the daemon is done with them

The daemon outlives the verb, and so does its supervisor. A daemon that dies early would be a disaster without one: with the
last descriptor of a userfaultfd closed, the kernel fills what is missing with zeros, and the programs go on with those. The
supervisor's duplicates prevent that: who touches a missing page waits, and the supervisor kills the container and leaves word.

Source: userfaultfd(2); CRIU's criu/uffd.c.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from runtime.criu import advice, binary
from runtime.criu.follow import wanted_of
from runtime.criu.request import LAZY_LOG
from runtime.errors import ContainerError, CriuError
from runtime.files import close_all, write_all
from runtime.linux import sockdiag
from runtime.linux.process import KCMP_FILE, kcmp, pidfd_getfd, pidfd_open, set_name, spare_from_oom
from runtime.memory.filler import Filler
from runtime.memory.later import Arrivals, noted
from runtime.memory.passes import Passes

SOCKET = "lazy-pages.socket"
NAME = "runtime:memory"
_KEPT = b"k"
_READY_TIMEOUT_S = 60.0
_LOOK_EVERY_S = 0.005
_END_TIMEOUT_S = 5.0


def listening(work_path: Path) -> bool:
    """Say whether a daemon listens in a work directory already; what a dead one left there is removed."""
    path = work_path / SOCKET
    try:
        if sockdiag.bound_at(str(path)):
            return True
        path.unlink()
    except OSError:
        pass
    return False


class Daemon(Protocol):
    """What the supervisor knows of its child, of subprocess.Popen."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def kill(self) -> None: ...


class CriuDaemon:
    """Starts `criu lazy-pages`, on images or on a page server."""

    name = "criu lazy-pages"

    def __init__(self, image_path: Path, work_path: Path, page_server: tuple[str, int] | None) -> None:
        self._argv = [binary.find(), "lazy-pages", "-D", str(image_path), "-W", str(work_path), "-o", LAZY_LOG, "-v2"]
        if page_server is not None:
            self._argv += ["--page-server", "--address", page_server[0], "--port", str(page_server[1])]

    def start(self, status: int) -> Daemon:
        """Start it; it writes to `status` when it listens, and closes it when it cannot."""
        return subprocess.Popen([*self._argv, "--status-fd", str(status)], pass_fds=(status,))


class OwnDaemon:
    """Starts our own, on the passes that lie beside the images."""

    name = "the filling of memory"

    def __init__(self, image_path: Path, work_path: Path, passes: Passes, requests: Path | None) -> None:
        self._image_path, self._work_path, self._passes, self._requests = image_path, work_path, passes, requests

    def start(self, status: int) -> Daemon:
        """Start it, as CriuDaemon does; in the end it tells `status` how it went, as JSON."""
        return _Forked(lambda: self._serve(status))

    def _serve(self, status: int) -> None:
        os.chdir(self._work_path)  # the name of a socket may only be short
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(SOCKET)
                listener.listen(1)
                self._passes.look()
                wanted = wanted_of(self._image_path)
                later = self._arrivals()
                os.write(status, b"\0")
                told = Filler(listener, self._passes, lambda number: wanted.get(number, []), later).run()
                os.write(status, json.dumps(told).encode())
        except (ContainerError, OSError) as e:
            Path(LAZY_LOG).write_text(f"Error (memory): {e}\n")
            raise
        finally:
            with contextlib.suppress(OSError):
                os.unlink(SOCKET)

    def _arrivals(self) -> Arrivals | None:
        """Return what of the memory comes later. Raises: ContainerError when nobody can be asked for it."""
        pages = noted(self._image_path)
        if pages is None:
            return None
        if self._requests is None:
            hint = "only while the checkpoint serves it, and with --memory-requests"
            raise ContainerError(f"memory of the images in {self._image_path} was to be sent later", hint=hint)
        return Arrivals(self._image_path, pages, self._requests)


class _Forked:
    """A function in a child process."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


class LazyPages:
    """The daemon of one restore, and its supervisor.

    `failed` is called in the supervisor when the daemon ends before all memory is there; `drained` when it is. Then a line of
    JSON goes to `report_fd`, which this owns: its end without one means that it failed, or that nothing was lazy.
    """

    def __init__(
        self,
        daemon: CriuDaemon | OwnDaemon,
        work_path: Path,
        failed: Callable[[str], None],
        drained: Callable[[], None],
        report_fd: int | None = None,
    ) -> None:
        self._daemon = daemon
        self._log = work_path / LAZY_LOG
        self._failed, self._drained, self._report_fd = failed, drained, report_fd
        self._sock: socket.socket | None = None

    def start(self) -> None:
        """Start both; return when the daemon listens. Raises: CriuError with the lines of its log."""
        self._sock, theirs = socket.socketpair()
        middle = os.fork()
        if middle == 0:
            # Nobody who waits for the verb, or reads what it prints, is to wait for the drain.
            os.setsid()
            if os.fork() == 0:
                self._sock.close()
                self._supervise(theirs)
            os._exit(0)
        theirs.close()
        if self._report_fd is not None:
            os.close(self._report_fd)
        os.waitpid(middle, 0)
        self._sock.settimeout(_READY_TIMEOUT_S)
        try:
            answer = self._sock.recv(65536).decode()
        except TimeoutError:
            answer = f"{self._daemon.name} was not ready in {_READY_TIMEOUT_S:.0f} s"
        if answer != "ready":
            raise self._failure(answer or f"{self._daemon.name} could not be started")

    def restored(self, pid: int) -> None:
        """Tell the supervisor that the processes are there; from now on it answers for them.

        Raises: CriuError when the daemon has died: the processes must never run.
        """
        assert self._sock is not None
        self._sock.send(f"restored {pid}".encode())
        if self._sock.recv(1) != b"1":
            raise self._failure(f"{self._daemon.name} ended before all memory was there")

    def failed_meanwhile(self) -> bool:
        """Say whether, after `restored`, the daemon ended before its time."""
        assert self._sock is not None
        return bool(select.select([self._sock], [], [], 0)[0]) and self._sock.recv(10) == b"failed"

    def keep(self) -> None:
        """The container is there for good: `drained` may be called when all its memory is."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.send(_KEPT)

    def close(self) -> None:
        """Without `restored` before, the daemon is ended. Idempotent."""
        if self._sock is not None:
            self._sock.close()

    def explained(self, error: CriuError) -> CriuError:
        """Return the error of a restore with what the daemon had to say first: CRIU only knows that it is gone."""
        if not (lines := self._lines()):
            return error
        return CriuError(error.message, log_lines=(*lines, *error.log_lines), hint=f"the whole log: {self._log}")

    def _lines(self) -> tuple[str, ...]:
        try:
            return tuple(advice.error_lines(self._log.read_text(errors="replace")))
        except OSError:
            return ()

    def _failure(self, reason: str) -> CriuError:
        lines = self._lines()
        return CriuError(reason, log_lines=lines, hint=advice.advise(lines) or f"the whole log: {self._log}")

    def _supervise(self, sock: socket.socket) -> None:
        try:
            # With both of us gone the programs would run on with zeros. The daemon, our child, has it from us.
            set_name(NAME)
            spare_from_oom()
            # Locks, the control descriptor, CRIU's socket: whoever waits for their ends is not to wait for the drain.
            kept = sorted(fd for fd in (sock.fileno(), self._report_fd) if fd is not None)
            for after, before in pairwise([2, *kept, os.sysconf("SC_OPEN_MAX")]):
                os.closerange(after + 1, before)
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            self._run(sock)
        except BaseException as e:
            # With us the duplicates of the userfaultfds would go, and the programs would run on with zeros.
            self._failed(f"the supervisor of its memory failed: {e}")
        finally:
            os._exit(0)

    def _run(self, sock: socket.socket) -> None:
        ready, status = os.pipe()
        daemon = self._daemon.start(status)
        os.close(status)
        # One that fails closes the pipe; one that listens writes to it first.
        if not os.read(ready, 1):
            daemon.wait()
            sock.send(f"{self._daemon.name} ended with status {daemon.returncode}".encode())
            return
        sock.send(b"ready")
        word = sock.recv(100).decode()
        if not word.startswith("restored "):
            daemon.kill()
            daemon.wait()
            return
        init = pidfd_open(int(word.split()[1]))
        kept = None
        while kept is None and daemon.poll() is None:
            kept = _userfaultfds(daemon.pid)
        # One that has drained already is through with them; one that died before we had its duplicates has closed them.
        sock.send(b"0" if daemon.poll() else b"1")
        container_ended = False
        while daemon.poll() is None:
            if not container_ended and select.select([init], [], [], _LOOK_EVERY_S)[0]:
                container_ended = True
                deadline = time.monotonic() + _END_TIMEOUT_S
            elif container_ended:
                time.sleep(_LOOK_EVERY_S)
                if time.monotonic() > deadline:
                    daemon.kill()
            _follow_descriptors(daemon.pid, kept or {})
        if daemon.returncode == 0:
            if self._report_fd is not None:
                with contextlib.suppress(OSError):  # nobody wants to know any more
                    write_all(self._report_fd, (os.read(ready, 1 << 16) or b"{}") + b"\n")
                os.close(self._report_fd)
            # The verb, too, must have done with the images, and the container be there for good.
            with contextlib.suppress(OSError):
                if sock.recv(1) == _KEPT:
                    self._drained()
        elif not container_ended:
            with contextlib.suppress(OSError):
                sock.send(b"failed")
            self._failed(
                str(self._failure(f"{self._daemon.name} ended with status {daemon.returncode} before all memory was there"))
            )


def _userfaultfds(pid: int) -> dict[int, int] | None:
    """Duplicate a process's userfaultfds: its number -> ours; None when it is to be tried again, or ending."""
    process = pidfd_open(pid)
    found: dict[int, int] = {}
    try:
        for number in _open_userfaultfds(pid):
            found[number] = pidfd_getfd(process, number)
    except OSError:
        close_all(list(found.values()))
        return None
    finally:
        os.close(process)
    return found


def _open_userfaultfds(pid: int) -> list[int]:
    """Return the numbers of a process's userfaultfds. Raises: OSError when it is ending: then nothing is known."""
    directory = f"/proc/{pid}/fd"
    targets = {int(name): os.readlink(f"{directory}/{name}") for name in os.listdir(directory)}
    # A process that ends loses its table of descriptors at once, also in the middle of our look.
    if not os.listdir(directory):
        raise ProcessLookupError(f"process {pid} is ending")
    return [number for number, target in targets.items() if target == "anon_inode:[userfaultfd]"]


def _follow_descriptors(pid: int, kept: dict[int, int]) -> None:
    """Let go of what the daemon itself has closed, since a process that is whole must not wait for us; keep what is new."""
    try:
        there = set(_open_userfaultfds(pid))
        gone = [n for n, ours in kept.items() if n not in there or not kcmp(os.getpid(), pid, KCMP_FILE, ours, n)]
    except OSError:
        return  # it closes one just now, or is ending: the next look, or its status, says more
    for number in gone:
        os.close(kept.pop(number))
    if new := there - set(kept):
        process = pidfd_open(pid)
        try:
            for number in new:  # of a process that was forked meanwhile
                kept[number] = pidfd_getfd(process, number)
        except OSError:
            return
        finally:
            os.close(process)
