"""The coordinator's end of the conversation with one agent."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

from migrate import faults, host
from migrate.agent.table import VERBS
from migrate.errors import ConnectionLost, ProtocolError, from_dict
from migrate.host import Host
from migrate.liveness import DEAD_AFTER_S, PING_EVERY_S
from migrate.transport.local import local_agent
from migrate.wire import Stream, Wire, greet, read_object
from migrate.wire_pb2 import Call, Frame

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
        stream.timeout_s = 2 * DEAD_AFTER_S
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
        while not self._closing.wait(PING_EVERY_S):
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
            if VERBS[verb].repeatable and faults.twice():
                self._call(verb, arguments, on_event)
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
                    on_event(frame.event.name, read_object(frame.event.fields, self.name))
            elif kind == "reply" and frame.reply.id == self._calls:
                return read_object(frame.reply.result, self.name)
            elif kind == "failure" and frame.failure.id == self._calls:
                raise from_dict(read_object(frame.failure.error, self.name))
            else:
                raise ProtocolError(f"{self.name} answered out of turn")

    def close(self) -> None:
        """End the conversation; the agent lets go of everything that is undecided. Idempotent."""
        self._closing.set()
        with contextlib.suppress(ConnectionLost, OSError):
            self._stream.close()


@dataclass(frozen=True, slots=True)
class Place:
    """A host as this one sees it: itself, or one that is reached over SSH."""

    host: Host | None

    @classmethod
    def named(cls, name: str, port: int = 0) -> Self:
        """Return what a name means; "-" is this host. Raises: HostUnreachable."""
        return cls(None if name == "-" else host.resolve(name, port))

    @property
    def name(self) -> str:
        return self.host.name if self.host else "this host"

    @property
    def is_here(self) -> bool:
        return self.host is None

    def open(self, remote_command: str) -> Session:
        """Start an agent there. Raises: MigrateError."""
        if self.host is None:
            return Session(local_agent(), self.name)
        from migrate.transport.ssh import SshStream

        return Session(SshStream(self.host, f"{remote_command} agent"), self.host.name)
