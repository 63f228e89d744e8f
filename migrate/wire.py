"""Frames over a pair of byte streams, with sizes bounded: what comes in may be hostile."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from migrate import PROTOCOL, __version__
from migrate.errors import ConnectionLost, HostUnfit, ProtocolError, from_dict, printable
from migrate.liveness import DEAD_AFTER_S
from migrate.wire_pb2 import Call, Frame, Hello

MAX_FRAME_BYTES = 4 << 20
MAX_RAW_BYTES = 1 << 20
# What is read and written at a time: small enough for the cache, large enough for few calls.
PIECE_BYTES = 256 << 10
_RAW = 1 << 31


class Said(dict[str, Any]):
    """What the other side answered. Raises: ProtocolError for what should be in it, and is not."""

    def __missing__(self, key: str) -> Any:
        raise ProtocolError(f"the other side left out {key!r} in its answer")


def read_object(text: str, who: str) -> Said:
    """Read an object that another side sent. Raises: ProtocolError."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"{who} sent something that is no JSON") from e
    if not isinstance(document, dict):
        raise ProtocolError(f"{who} sent something else than an object")
    return Said(document)


class Stream(Protocol):
    """Bytes in and out. All raise ConnectionLost; `read_into` fills the whole buffer, `read_some` what is there."""

    def read_into(self, buffer: memoryview) -> None: ...

    def read_some(self, buffer: memoryview) -> int: ...

    def write(self, data: bytes | memoryview) -> None: ...

    def close(self) -> None: ...


class Wire:
    """Sends and receives frames; counts the bytes of both directions."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.sent_bytes = self.received_bytes = 0
        self._head = bytearray(4)

    def send(self, frame: Frame) -> None:
        """Send one frame. Raises: ConnectionLost, ProtocolError."""
        data = frame.SerializeToString()
        if len(data) > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {len(data)} bytes is more than the {MAX_FRAME_BYTES} allowed")
        self.stream.write(struct.pack(">I", len(data)) + data)
        self.sent_bytes += 4 + len(data)

    def send_raw(self, data: memoryview) -> None:
        """Send file content, at most MAX_RAW_BYTES. Raises: ConnectionLost."""
        self.stream.write(struct.pack(">I", _RAW | len(data)))
        self.stream.write(data)
        self.sent_bytes += 4 + len(data)

    def _read_head(self) -> int:
        self.stream.read_into(memoryview(self._head))
        self.received_bytes += 4
        return int(struct.unpack(">I", self._head)[0])

    def receive(self) -> Frame:
        """Return the next frame. Raises: ConnectionLost, ProtocolError."""
        length = self._read_head()
        if length > MAX_FRAME_BYTES:
            raise ProtocolError("the other side sent a frame that is too large, or something that is no frame")
        data = bytearray(length)
        self.stream.read_into(memoryview(data))
        self.received_bytes += length
        frame = Frame()
        try:
            frame.ParseFromString(bytes(data))
        except DecodeError as e:
            raise ProtocolError("the other side sent something that is no frame") from e
        return frame

    def receive_raw(self, buffer: memoryview) -> Iterator[memoryview]:
        """Give the next piece of file content, in parts of `buffer` as they arrive.

        Handling what has come while it is in the processor's cache is much faster than filling a large buffer first.

        Raises: ConnectionLost, ProtocolError.
        """
        length = self._read_head()
        if not length & _RAW or not 0 < length - _RAW <= MAX_RAW_BYTES:
            raise ProtocolError("the other side sent something else than the file content that it had announced")
        length -= _RAW
        self.received_bytes += length
        while length:
            count = self.stream.read_some(buffer[:length])
            yield buffer[:count]
            length -= count


def greet(wire: Wire, who: str, noise: Callable[[], str] = lambda: "") -> Hello:
    """Exchange hellos; return the other side's.

    `noise` tells what the other side printed on its stderr, for the error.

    Raises: HostUnfit, ConnectionLost.
    """
    try:
        wire.send(Frame(hello=Hello(protocol=PROTOCOL, version=__version__, dead_after_ms=int(DEAD_AFTER_S * 1000))))
        frame = wire.receive()
    except ProtocolError as e:
        raise HostUnfit(
            f"{who}: what answered is no Ferry agent",
            hint="a shell start-up file on that host must print nothing when it is not interactive",
        ) from e
    except ConnectionLost as e:
        said = printable(noise().strip())
        raise HostUnfit(
            f"{who}: no Ferry agent could be started there{': ' + said if said else ''}",
            hint="install Ferry there, with `migrate` on the PATH that sshd gives, or name it with --remote-command",
        ) from e
    if frame.WhichOneof("body") != "hello" or frame.hello.protocol != PROTOCOL:
        raise HostUnfit(
            f"{who}: Ferry {printable(frame.hello.version) or 'of unknown version'} there speaks protocol "
            f"{frame.hello.protocol}, this one {PROTOCOL}",
            hint="install the same version on both hosts",
        )
    return frame.hello


def ask(wire: Wire, call_id: int, verb: str, arguments: dict[str, Any], who: str) -> Said:
    """Call a verb of an agent that tells nothing on the way; return its result. Raises: MigrateError."""
    send_call(wire, call_id, verb, arguments)
    return answer(wire, who)


def send_call(wire: Wire, call_id: int, verb: str, arguments: dict[str, Any]) -> None:
    """Begin a call. Raises: ConnectionLost."""
    wire.send(Frame(call=Call(id=call_id, verb=verb, arguments=json.dumps(arguments))))


def answer(wire: Wire, who: str, skip: str = "") -> Said:
    """Return the result of the call that was begun; frames of the kind `skip` may come before it. Raises: MigrateError."""
    while (frame := wire.receive()).WhichOneof("body") == skip:
        pass
    if frame.WhichOneof("body") == "failure":
        raise from_dict(read_object(frame.failure.error, who))
    if frame.WhichOneof("body") != "reply":
        raise ProtocolError(f"{who} answered out of turn")
    return read_object(frame.reply.result, who)
