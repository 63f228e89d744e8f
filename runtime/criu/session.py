"""One conversation with `criu swrk`: a request, the notifies that it makes, and its response.

    us                                    criu swrk FD
     |  criu_req {DUMP, opts} ------------>|
     |  <-------- criu_resp {NOTIFY, pre-dump}
     |  criu_req {NOTIFY, success} ------->|      CRIU waits at every notify until it is answered;
     |  <-------- criu_resp {NOTIFY, ...}  |      "no", or our end closing, is a failure there
     |  ...                                |
     |  <-------- criu_resp {DUMP, success | errno, errmsg}

Each message is one datagram of a SOCK_SEQPACKET pair; a notify may carry a file descriptor.

Source: CRIU's images/rpc.proto and criu/cr-service.c.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.criu import advice, binary
from runtime.errors import CriuError, CriuMissing

# A handler gets the notify's script, its pid (0 if it has none) and its descriptor, and says yes or no.
Handler = Callable[[str, int, "int | None"], bool]

_IDLE_S = 0.02


def _messages() -> Any:
    try:
        from pycriu import rpc_pb2
    except ImportError as e:
        raise CriuMissing(f"pycriu is not installed: {e}", hint="run scripts/install-criu") from e
    return rpc_pb2


def _fill(message: Any, fields: dict[str, Any]) -> None:
    """Set a message's fields from a dict; None leaves one out."""
    for name, value in fields.items():
        if value is None:
            continue
        if isinstance(value, dict):
            _fill(getattr(message, name), value)
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, dict):
                    _fill(getattr(message, name).add(), item)
                else:
                    getattr(message, name).append(item)
        else:
            setattr(message, name, value)


class Session:
    """A running `criu swrk`, good for one request.

    `in_child` runs in the CRIU process before it is executed, e.g. to move it into a cgroup; `pass_fds` are the
    descriptors that it gets beside its stdio, under the numbers that they have here. `stdout` is where its words go; a
    restored container gets ours.
    """

    def __init__(
        self, in_child: Callable[[], None] | None = None, pass_fds: tuple[int, ...] = (), stdout: int | None = None
    ) -> None:
        self._rpc = _messages()
        path = binary.find()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.process = subprocess.Popen(
                [path, "swrk", str(theirs.fileno())], pass_fds=(theirs.fileno(), *pass_fds), preexec_fn=in_child, stdout=stdout
            )
        except (OSError, subprocess.SubprocessError) as e:
            self._sock.close()
            raise CriuMissing(f"cannot start {path}: {e}") from e
        finally:
            # With this end open a CRIU that dies would never be an EOF.
            theirs.close()

    def close(self) -> None:
        """Close our end and reap CRIU. An unfinished request fails: CRIU rolls it back. Idempotent."""
        self._sock.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
            return
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(
        self,
        kind: str,
        opts: dict[str, Any],
        images: Path | int,
        work: Path,
        log: str,
        handler: Handler,
        on_idle: Callable[[], None] | None = None,
    ) -> Any:
        """Make a request about images (a directory, or a descriptor of one), answer its notifies, return the response.

        `on_idle` is called now and then while CRIU says nothing.

        Raises: CriuError with the log's error lines and advice; whatever `handler` raises, after CRIU was told no.
        """
        fds = []
        try:
            fds.append(
                os.dup(images) if isinstance(images, int) else os.open(images, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            )
            fds.append(os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            request = self._rpc.criu_req(type=getattr(self._rpc, kind))
            _fill(request.opts, {**opts, "images_dir_fd": fds[0], "work_dir_fd": fds[1]})
            self._send(request)
            return self._converse(kind, work / log, handler, on_idle)
        except OSError as e:
            raise CriuError(f"cannot use image directory {e.filename or images}: {e.strerror}") from e
        finally:
            for fd in fds:
                os.close(fd)

    def _converse(self, kind: str, log: Path, handler: Handler, on_idle: Callable[[], None] | None) -> Any:
        pending: BaseException | None = None
        while True:
            while on_idle is not None and not select.select([self._sock], [], [], _IDLE_S)[0]:
                on_idle()
            response, fd = self._receive()
            if response is None:
                status = self.process.wait()
                raise pending or self._failure(kind, log, f"criu ended with status {status} before it answered")
            if response.type == self._rpc.NOTIFY:
                answer = False
                if pending is None:
                    try:
                        answer = handler(response.notify.script, response.notify.pid, fd)
                    except BaseException as e:
                        pending = e  # CRIU is told no first, so that it undoes what it did
                self._send(self._rpc.criu_req(type=self._rpc.NOTIFY, notify_success=answer))
                continue
            if pending is not None:
                raise pending
            if not response.success:
                reason = response.cr_errmsg.strip() or os.strerror(response.cr_errno or 0)
                raise self._failure(kind, log, reason)
            return response

    def _failure(self, kind: str, log: Path, reason: str) -> CriuError:
        try:
            lines = advice.error_lines(log.read_text(errors="replace"))
        except OSError:
            lines = (f"{log} is not there: CRIU failed before it wrote a log",)
        hint = advice.advise(lines) or f"the whole log: {log}"
        summary = "" if lines and not lines[0].startswith("/") else f": {reason}"
        return CriuError(f"criu {kind.lower()} failed{summary}", log_lines=lines, hint=hint)

    def _send(self, request: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the EOF that follows says more
            self._sock.send(request.SerializeToString())

    def _receive(self) -> tuple[Any, int | None]:
        try:
            size = self._sock.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
            data, ancillary, _, _ = self._sock.recvmsg(size, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return None, None
        if not data:
            return None, None
        fds = array.array("i")
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        response = self._rpc.criu_resp()
        response.ParseFromString(data)
        return response, fds[0] if fds else None


def version() -> tuple[int, int, int]:
    """Ask CRIU for its version. Raises: CriuError."""
    with Session(stdout=subprocess.DEVNULL) as session:
        session._send(session._rpc.criu_req(type=session._rpc.VERSION))
        response, _ = session._receive()
        if response is None or not response.success:
            raise CriuError("criu does not tell its version")
        v = response.version
        return (v.major_number, v.minor_number, v.sublevel)


def check_features() -> dict[str, bool]:
    """Ask CRIU what this kernel has of mem_track, lazy_pages and pidfd_store. Raises: CriuError."""
    names = ("mem_track", "lazy_pages", "pidfd_store")
    with Session(stdout=subprocess.DEVNULL) as session:
        request = session._rpc.criu_req(type=session._rpc.FEATURE_CHECK)
        for name in names:
            setattr(request.features, name, True)
        session._send(request)
        response, _ = session._receive()
        if response is None or not response.success:
            raise CriuError("criu does not tell what this kernel can do")
        return {name: bool(getattr(response.features, name)) for name in names}
