"""The second agent of a host in a move: it carries bulk data for the first one, and ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from migrate import places
from migrate.agent.side import Side
from migrate.errors import ConnectionLost, ProtocolError
from migrate.incoming import TreeReceiver
from migrate.transport.local import FdStream
from migrate.transport.striped import Receiving

ALLOWED = "receives"
MOST_LANES = 7
_LOOK_S, _CONNECT_S, _SILENT_S, _ASK_S = 1.0, 30.0, 60.0, 0.02
_PIECE_BYTES = 1 << 18


def _lanes(migration_id: str) -> Path:
    return places.working(migration_id) / "lanes"


class BulkSide(Side):
    _attached = ""
    _relays: FdStream | None = None
    _listener: socket.socket | None = None  # for further connections
    _requests = -1  # where memory is asked for that comes after the restore

    def attach(self, migration_id: str) -> None:
        """Make this agent the bulk end of a move that another agent of this host has prepared."""
        self._taken(migration_id)
        self._attached = migration_id
        self._live_with(migration_id)
        if self._listener is not None:
            self._listener.close()
        _lanes(migration_id).unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(_lanes(migration_id)))
        self._listener.listen(MOST_LANES)
        self._listener.settimeout(_CONNECT_S)
        # Who asks for memory that comes after the restore sees by its end that nobody has it any more.
        requests = places.requests(migration_id)
        if not requests.exists():
            os.mkfifo(requests, 0o600)
        if self._requests < 0:
            self._requests = os.open(requests, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    @staticmethod
    def _taken(migration_id: str) -> list[str]:
        """Return the directories that are taken for a move. Raises: ProtocolError when nothing is taken, or not any more."""
        try:
            return list(json.loads((places.working(migration_id) / ALLOWED).read_text()))
        except OSError as e:
            raise ProtocolError(f"no move {migration_id} is prepared here to take files") from e

    def _live_with(self, migration_id: str) -> None:
        """Wait for bytes as long as the move is there: the other side may scan, dump or wait for long without a word."""
        stream, working = self.wire.stream, places.working(migration_id)
        if isinstance(stream, FdStream):
            stream.timeout_s = _LOOK_S
            stream.patient = working.exists

    def lane(self, migration_id: str, number: int) -> None:
        """Become another connection of the bulk end, which takes it in with `widen`."""
        self._taken(migration_id)
        self._live_with(migration_id)
        self._become_pipe(_lanes(migration_id), migration_id)
        self._socket.sendall(bytes([number]))

    def widen(self, count: int) -> None:
        """From the next byte on, read what comes over `count` further connections, too, as migrate/transport/striped.py says."""
        first = self.wire.stream
        if self._listener is None or not isinstance(first, FdStream) or not 0 < count <= MOST_LANES:
            raise ProtocolError("there is nothing to be widened here")
        lanes: dict[int, FdStream] = {}
        while len(lanes) < count:
            try:
                made, _ = self._listener.accept()
            except TimeoutError as e:
                raise ProtocolError(f"{count} further connections were announced, and {len(lanes)} came") from e
            number, fd = made.recv(1), made.detach()
            lane = lanes[number[0] if number else 0] = FdStream(fd, fd, "the source")
            lane.timeout_s, lane.patient = first.timeout_s, first.patient
        self._listener.close()
        if sorted(lanes) != list(range(1, count + 1)):
            raise ProtocolError("the further connections are not those that were announced")
        self.wire.stream = Receiving((first, *(lanes[n] for n in sorted(lanes))))

    def receive_tree(self, root: str, asks: bool = False, reserve_bytes: int = 0) -> dict[str, Any]:
        """Take a tree into one of the directories that were prepared for it.

        With `asks` it is the memory that comes after the restore: its space is taken at once, and what is to come first is told
        meanwhile.
        """
        taken, images = self._taken(self._attached), str(places.images(self._attached))
        if root not in (*taken, images) or (asks and root != images):
            raise ProtocolError(f"{root!r} was not prepared for this move")
        receiver = TreeReceiver(
            Path(root), flat=root == images, alone=places.LATER.encode() if asks else None, reserve_bytes=reserve_bytes
        )
        try:
            if root not in (*self._taken(self._attached), images):
                raise ProtocolError(f"{root!r} is not taken any more")
            if asks:
                with self._telling():
                    receiver.receive(self.wire)
                places.served(self._attached).touch()
            else:
                receiver.receive(self.wire)
        finally:
            receiver.close()
        return {"entries": receiver.entries, "content_bytes": receiver.content_bytes}

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell the source what is asked for. When it is silent for long, nobody is to wait for the rest."""
        over = threading.Event()
        thread = threading.Thread(target=self._tell, args=(over,), daemon=True)
        thread.start()
        stream = self.wire.stream
        assert isinstance(stream, FdStream | Receiving)
        patience = (stream.timeout_s, stream.patient)
        stream.timeout_s, stream.patient = _SILENT_S, None
        is_whole = False
        try:
            yield
            is_whole = True
        finally:
            over.set()
            thread.join()
            stream.timeout_s, stream.patient = patience
            if not is_whole:
                os.close(self._requests)
                self._requests = -1

    def _tell(self, over: threading.Event) -> None:
        rest = b""
        with contextlib.suppress(ConnectionLost):
            self._on_event("words", words=[])  # it may begin
        while not over.is_set():
            if not select.select([self._requests], [], [], _ASK_S)[0]:
                continue
            data = os.read(self._requests, 1 << 16)
            if not data:
                over.wait(_ASK_S)  # nobody has asked yet, or nobody will any more
                continue
            *words, rest = (rest + data).split(b"\n")
            if words:
                with contextlib.suppress(ConnectionLost):
                    self._on_event("words", words=[w.decode() for w in words])

    def relay(self, migration_id: str) -> None:
        """Become the pipe between the coordinator and the first agent here, whose data connection it carries."""
        self._live_with(migration_id)
        self._become_pipe(places.working(migration_id) / "data", migration_id)

    def _become_pipe(self, path: Path, migration_id: str) -> None:
        if not isinstance(self.wire.stream, FdStream):
            raise ProtocolError("this agent has no stream to relay")
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError as e:
            raise ProtocolError(f"no move {migration_id} waits for data here") from e
        self._relays = self.wire.stream

    def pump(self) -> None:
        """Carry bytes in both directions until one of them ends. Raises: OSError when it breaks."""
        stream = self._relays
        assert stream is not None
        fd_in, fd_out = stream.fds
        pairs = {fd_in: self._socket.fileno(), self._socket.fileno(): fd_out}
        while True:
            ready, _, _ = select.select(list(pairs), [], [], _LOOK_S)
            if not ready and stream.patient is not None and not stream.patient():
                return
            for fd in ready:
                data = os.read(fd, _PIECE_BYTES)
                if not data:
                    return
                view = memoryview(data)
                while view:
                    view = view[os.write(pairs[fd], view) :]

    @property
    def relays(self) -> bool:
        return self._relays is not None
