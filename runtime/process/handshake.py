"""The talk between the verb that makes a process and the process that it makes.

    create, run, exec                          the new process (a clone with all its new namespaces)
        |  clone ------------------------------->  |  dies with its parent from now on
        |  save pid in state.json                  |
        |  join its cgroups, rlimits, oom score    |
        |  {"go"} ------------------------------>  |  join and make namespaces, build the rootfs
        |  <---------------------- {"hooks"}       |  (the first process of a container only)
        |  run prestart, createRuntime             |
        |  {"go"} ------------------------------>  |  createContainer hooks, pivot_root, masks, user, capabilities
        |  <---------------------- {"console"}+fd  |  (with a terminal only)
        |  <---------------------- {"ready"}       |  everything that can fail but execve has been done
        |  save state.json                         |
        |  {"go"} ------------------------------>  |  lives on without its parent
        |  <---------------------- EOF             |  `exec` goes on to execve; a container waits on start.sock

At any moment the new process may send {"error": fields} instead and end. EOF from the parent means that it is dead:
the new process ends too. Both ends close on execve, so that EOF also says that execve succeeded. An execve that fails sends the
four bytes of its errno (see `runtime.linux.execstub`).

    start                                      the container's first process, waiting on start.sock
        |  connect, {"go"} --------------------->  |  startContainer hooks, execve
        |  <---------------------- EOF | {"error"} |
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from runtime.errors import CommandNotExecutable, ContainerError, from_dict

MAX_MESSAGE_BYTES = 65536
_MAX_TEXT = 8192


class Channel:
    """Whole JSON messages over a SOCK_SEQPACKET socket, each with at most one file descriptor."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(a), cls(b)

    def close(self) -> None:
        self.sock.close()

    def send(self, message: dict[str, Any], fd: int | None = None) -> None:
        """Send one message. Raises: ContainerError when the other side is gone."""
        if "error" in message:  # it may quote a document, which may be of any length
            message = {"error": {**message["error"], "message": str(message["error"].get("message"))[:_MAX_TEXT]}}
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self.sock.sendmsg([json.dumps(message).encode()], rights)
        except (BrokenPipeError, ConnectionResetError) as e:
            raise ContainerError("the process at the other end of the handshake is gone") from e

    def receive(self) -> tuple[dict[str, Any] | None, int | None]:
        """Return the next message and the descriptor with it; (None, None) at EOF.

        Raises: the ContainerError that the other side sent.
        """
        try:
            data, ancillary, _, _ = self.sock.recvmsg(MAX_MESSAGE_BYTES, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, ancillary = b"", []
        if not data:
            return None, None
        fds = array.array("i")
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
        if len(data) == 4:  # the stub's errno; no JSON message is so short
            number = int.from_bytes(data, sys.byteorder)
            raise CommandNotExecutable(f"exec: {os.strerror(number).lower()}")
        message: dict[str, Any] = json.loads(data)
        if "error" in message:
            raise from_dict(message["error"])
        return message, fds[0] if fds else None

    def expect(self, kind: str) -> None:
        """Wait for one kind of message; EOF and anything else is an error. Raises: ContainerError."""
        message, _ = self.receive()
        if message is None:
            raise ContainerError("the process at the other end of the handshake is gone")
        if kind not in message:
            raise ContainerError(f"handshake out of order: {message} instead of {kind}")


def listen_for_start(state_dir: Path) -> socket.socket:
    """Make start.sock. The path goes through a directory descriptor: a unix address holds 107 bytes only."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    directory = os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{directory}/start.sock")
    finally:
        os.close(directory)
    listener.listen(8)
    return listener


def connect_to_start(state_dir: Path) -> Channel | None:
    """Reach the process that waits to be started; None when none does (not yet made, started already, or dead)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    directory = os.open(state_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{directory}/start.sock")
    except (ConnectionRefusedError, FileNotFoundError):
        sock.close()
        return None
    finally:
        os.close(directory)
    return Channel(sock)


def wait_for_start(listener: socket.socket) -> Channel:
    """Block until `start` says go. A connection that says nothing only asked whether we wait.

    A signal that ends most programs ends us: the kernel spares the first process of a namespace that has no handler.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, lambda n, _: os._exit(128 + n))
    while True:
        connection, _ = listener.accept()
        channel = Channel(connection)
        message, _ = channel.receive()
        if message is not None and "go" in message:
            listener.close()
            return channel
        channel.close()
