"""A tree and its copy, with all of the sending and the writing between them, over a socket."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

from migrate.errors import ConnectionLost, MigrateError
from migrate.incoming import TreeReceiver
from migrate.ship import Shipped, Shipper
from migrate.transport.local import FdStream
from migrate.tree import Tree
from migrate.wire import Wire, greet
from migrate.wire_pb2 import Failure, Frame, Reply


def _stream(end: socket.socket) -> FdStream:
    fd = end.detach()
    return FdStream(os.dup(fd), fd, "the other end")


class Copies:
    """Sends `source` to `copy` as often as it is asked to."""

    def __init__(self, source: Path, copy: Path) -> None:
        self._copy = copy
        ours, theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, args=(_stream(theirs),), daemon=True)
        self._thread.start()
        self._shipper = Shipper(_stream(ours), "the copy")
        self._tree = Tree(source, watched=False)

    def _serve(self, stream: FdStream) -> None:
        wire = Wire(stream)
        greet(wire, "the source")
        while True:
            try:
                call = wire.receive().call
            except ConnectionLost:
                return
            receiver = TreeReceiver(self._copy)
            try:
                receiver.receive(wire)
                answer = {"entries": receiver.entries, "content_bytes": receiver.content_bytes}
                wire.send(Frame(reply=Reply(id=call.id, result=json.dumps(answer))))
            except MigrateError as e:
                wire.send(Frame(failure=Failure(id=call.id, error=json.dumps(e.as_dict()))))
            finally:
                receiver.close()

    def send(self) -> Shipped:
        return self._shipper.send_tree(self._tree, str(self._copy), lambda done, total: None)

    def close(self) -> None:
        self._tree.close()
        self._shipper.close()
        self._thread.join(10)
