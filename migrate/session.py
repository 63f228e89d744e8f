"""The coordinator's end of the conversation with one agent."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from typing import Any, Protocol

from migrate.agent import VERBS
from migrate.errors import ConnectionLost, ProtocolError, from_dict
from migrate.host import Host
from migrate.transport.local import local_agent
from migrate.wire import Stream, Wire, greet
from migrate.wire_pb2 import Call, Frame

_PING_EVERY_S = 5.0

OnEvent = Callable[[str, dict[str, Any]], None]


class AgentStream(Stream, Protocol):
    timeout_s: float | None

    def noise(self) -> str: ...


class Session:
    """Calls an agent's verbs; keeps it from thinking that we are gone while others are called.

    Raises (constructor): HostUnfit.
    """

    def __init__(self, stream: AgentStream, name: str) -> None:
        self.name = name
        self._stream, self._wire = stream, Wire(stream)
        self._calls = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        stream.timeout_s = 30
        try:
            greet(self._wire, name, stream.noise)
        except BaseException:
            stream.close()
            raise
        self._pinger = threading.Thread(target=self._ping, name=f"ping {name}", daemon=True)
        self._pinger.start()

    @property
    def wire_bytes(self) -> int:
        return self._wire.sent_bytes + self._wire.received_bytes

    def _ping(self) -> None:
        while not self._closing.wait(_PING_EVERY_S):
            # Who is busy with a call has heard of us when it ends.
            if self._lock.acquire(blocking=False):
                try:
                    self._call("ping", {}, None)
                except Exception:
                    return  # the next call finds out, and says why
                finally:
                    self._lock.release()

    def call(self, verb: str, on_event: OnEvent | None = None, **arguments: Any) -> dict[str, Any]:
        """Call a verb of the agent's table; return its result.

        Raises: ConnectionLost when the connection breaks or the verb's time is over; otherwise what the agent says.
        """
        with self._lock:
            return self._call(verb, arguments, on_event)

    def _call(self, verb: str, arguments: dict[str, Any], on_event: OnEvent | None) -> dict[str, Any]:
        self._calls += 1
        self._stream.timeout_s = VERBS[verb].timeout_s
        self._wire.send(Frame(call=Call(id=self._calls, verb=verb, arguments=json.dumps(arguments))))
        while True:
            frame = self._wire.receive()
            kind = frame.WhichOneof("body")
            if kind in ("event", "reply", "failure") and getattr(frame, kind).id < self._calls:
                continue  # of a call that was interrupted
            if kind == "event" and frame.event.id == self._calls:
                if on_event:
                    on_event(frame.event.name, json.loads(frame.event.fields))
            elif kind == "reply" and frame.reply.id == self._calls:
                result: dict[str, Any] = json.loads(frame.reply.result)
                return result
            elif kind == "failure" and frame.failure.id == self._calls:
                raise from_dict(json.loads(frame.failure.error))
            else:
                raise ProtocolError(f"{self.name} answered out of turn")

    def close(self) -> None:
        """End the conversation; the agent lets go of everything that is undecided. Idempotent."""
        self._closing.set()
        with contextlib.suppress(ConnectionLost, OSError):
            self._stream.close()


def open_local() -> Session:
    """Start an agent on this host. Raises: MigrateError."""
    return Session(local_agent(), "this host")


def open_remote(host: Host, remote_command: str) -> Session:
    """Start an agent on another host. Raises: MigrateError."""
    from migrate.transport.ssh import SshStream

    return Session(SshStream(host, f"{remote_command} agent"), host.name)
