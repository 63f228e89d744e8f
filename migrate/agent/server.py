"""Serve calls until the stream ends."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from typing import Any

from migrate.agent.bulk import BulkSide
from migrate.agent.host import HostSide
from migrate.agent.side import Permissions, Side
from migrate.agent.source import SourceSide
from migrate.agent.table import VERBS
from migrate.agent.target import TargetSide
from migrate.errors import MigrateError, ProtocolError
from migrate.liveness import idle_timeout_s
from migrate.transport.local import FdStream
from migrate.wire import Wire, greet
from migrate.wire_pb2 import Event, Failure, Frame, Reply

# What wrong arguments of a verb end in, after all that the verb itself checks.
_WRONG = (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError)


class Agent:
    """Answers calls with the verbs of its four sides, of which a move uses one or two."""

    def __init__(self, wire: Wire, permissions: Permissions) -> None:
        self.wire, self._permissions = wire, permissions
        self._call_id = 0
        sides = (HostSide, SourceSide, TargetSide, BulkSide)
        self._sides: dict[type[Side], Side] = {kind: kind(wire, self._event, permissions) for kind in sides}

    def serve(self) -> None:
        """Answer calls until the stream ends; then let go of everything."""
        try:
            hello = greet(self.wire, "the coordinator")
            if isinstance(self.wire.stream, FdStream):
                self.wire.stream.timeout_s = idle_timeout_s(hello.dead_after_ms)
            while True:
                frame = self.wire.receive()
                if frame.WhichOneof("body") != "call":
                    raise ProtocolError("a call was expected")
                self._answer(frame)
                bulk = self._sides[BulkSide]
                if isinstance(bulk, BulkSide) and bulk.relays:
                    bulk.pump()
                    return
        except (MigrateError, OSError):
            pass
        finally:
            # Nobody reads what is said from here on, and nothing of it must end this process.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for side in self._sides.values():
                with contextlib.suppress(MigrateError, OSError, ValueError, KeyError):
                    side.stream_lost()

    def _answer(self, frame: Frame) -> None:
        call = frame.call
        self._call_id = call.id
        verb = VERBS.get(call.verb)
        try:
            if verb is None:
                raise ProtocolError(f"there is no verb {call.verb[:64]!r}")
            self._permissions.require_role(verb.role)
            side = self._sides[verb.side]
            try:
                arguments = json.loads(call.arguments or "{}")
                side.before(call.verb)
                result = verb.handler(side, **arguments)
                reply = Frame(reply=Reply(id=call.id, result=json.dumps(result or {})))
            except _WRONG as e:
                raise ProtocolError(f"{call.verb}: {type(e).__name__}: {e}") from e
            except OSError as e:
                raise MigrateError(f"{call.verb}: {e.filename or 'system call'}: {e.strerror or e}") from e
        except MigrateError as e:
            # Also a lost data connection: that to the coordinator fails when this is sent.
            reply = Frame(failure=Failure(id=call.id, error=json.dumps(e.as_dict())))
        self.wire.send(reply)

    def _event(self, name: str, **fields: Any) -> None:
        self.wire.send(Frame(event=Event(id=self._call_id, name=name, fields=json.dumps(fields))))


def main(argv: list[str] | None = None) -> None:
    """Serve one coordinator over stdin and stdout."""
    parser = argparse.ArgumentParser(prog="migrate agent", description="Serve one coordinator over stdin and stdout.")
    parser.add_argument(
        "--only-below",
        action="append",
        default=[],
        metavar="DIRECTORY",
        help="Take bundles only below this directory. May be repeated. For a forced command in authorized_keys.",
    )
    parser.add_argument("--as", dest="role", choices=("source", "target"), default="", help="Be only this part of a move.")
    asked = parser.parse_args(argv)
    permissions = Permissions.of(asked.only_below, asked.role, forced="SSH_ORIGINAL_COMMAND" in os.environ)
    # A terminal's ^C is the coordinator's to decide on; and an sshd that goes must not take a prepared container along.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    streams = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # whatever prints by mistake must not become a frame
    Agent(Wire(FdStream(*streams, "the coordinator")), permissions).serve()
