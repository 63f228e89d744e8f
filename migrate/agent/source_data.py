"""What goes to the target: the data connection, and the directories that are followed and, when it is over, removed here."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from migrate import places, processes
from migrate.agent import source_layers, volumes
from migrate.agent.pace import progress
from migrate.agent.side import OnEvent, Permissions
from migrate.agent.source_network import SourceNetwork
from migrate.errors import MigrateError, ProtocolError, Stopped
from migrate.manifest import Inode
from migrate.outlet import Compress
from migrate.overlay import Overlay
from migrate.ship import Shipped, Shipper
from migrate.transport.local import FdStream, ProcessStream
from migrate.tree import Tree
from migrate.wire import Wire

_CONNECT_S = 30.0


class SourceData(SourceNetwork):
    _bundle = ""
    _pid = 0
    _decided = False
    _shipper: Shipper | None = None
    _listener: socket.socket | None = None
    _volumes: tuple[str, ...] = ()  # that move along
    _overlay: Overlay | None = None  # that the root is
    _trees: tuple[tuple[Tree, str], ...] = ()  # the bundle, its volumes, the root's own layer: where each is on the target

    def __init__(self, wire: Wire, on_event: OnEvent, permissions: Permissions) -> None:
        super().__init__(wire, on_event, permissions)
        self._stamps = volumes.Stamps()
        self._inodes: dict[str, int] = {}  # what is removed in the end

    def _stop_if_asked(self) -> None:
        if self._id is not None and not self._decided and (places.working(self._id) / "stop").exists():
            raise Stopped(f"the move {self._id} was stopped by `migrate abort`")

    def open_data(self, address: dict[str, Any], remote_command: str, name: str, sending: dict[str, Any]) -> None:
        """Connect to the target's second agent. `sending` is how what goes there is sent."""
        argv, what = self._connection(address, remote_command), f"the data connection to {name}"
        self._attach(ProcessStream(argv, what), name, sending)
        self._data().widen(argv, what, self._migration())

    def listen_data(self) -> None:
        """Wait for a data connection that the coordinator makes, since this host does not reach the target."""
        path = places.working(self._migration()) / "data"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(_CONNECT_S)

    def accept_data(self, name: str, sending: dict[str, Any]) -> None:
        """Take the data connection that the coordinator made. Raises: MigrateError."""
        if self._listener is None:
            raise ProtocolError("listen_data was not called")
        try:
            made, _ = self._listener.accept()
        except TimeoutError as e:
            raise MigrateError("the coordinator did not make the data connection") from e
        fd = made.detach()
        made_stream = FdStream(fd, fd, f"the data connection to {name}")
        self._attach(made_stream, name, sending)

    def _attach(self, stream: ProcessStream | FdStream, name: str, sending: dict[str, Any]) -> None:
        compress, limit, connections = sending["compress"], sending["bandwidth_limit"], sending["parallel"]
        self._shipper = Shipper(stream, name, Compress(compress), float(limit), int(connections))
        self._shipper.call("attach", {"migration_id": self._migration()})

    def _data(self) -> Shipper:
        if self._shipper is None:
            raise ProtocolError("there is no data connection")
        return self._shipper

    def _told(self, shipped: Shipped) -> dict[str, Any]:
        return {**asdict(shipped), "wire_bytes": self._data().wire_bytes}

    def _progress(self) -> Callable[[int, int], None]:
        return progress(self._on_event, self._stop_if_asked)

    def _close_data(self) -> None:
        for tree, _ in self._trees:
            tree.close()
        self._trees = ()
        if self._shipper is not None:
            self._shipper.close()
            self._shipper = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def stamp(self, path: str, mtime_s: int) -> None:
        """Set when a shared volume was modified, until `unstamp`. Raises: MigrateError."""
        self._require_shared(path)
        self._stamps.make(path, int(mtime_s))

    def unstamp(self, path: str) -> None:
        """Put back when it was modified, unless it was modified since. Idempotent."""
        self._stamps.undo(path)

    def ship_bundle(self) -> dict[str, Any]:
        """Make the target's copy of the bundle, and of the volumes that move along, equal to what it is now."""
        self._migration()
        if not self._trees:
            self._trees = source_layers.trees(self._overlay, self._bundle, self._volumes)
        return self._send_trees()

    def ship_layers(self, missing: dict[str, str]) -> dict[str, Any]:
        """Send those layers of the root that the target has not, each to where it waits for it."""
        places_of = {layer.digest: layer.path for layer in (self._overlay.layers if self._overlay else ())}
        tell = self._progress()
        sent = [
            self._data().send_tree(Tree(Path(places_of[d]), watched=False), p, tell, patches=False) for d, p in missing.items()
        ]
        return self._told(functools.reduce(Shipped.plus, sent))

    def _send_trees(self, mapped: Collection[Inode] = (), opened: Collection[Inode] = ()) -> dict[str, Any]:
        """Send what of the files is other than on the target, and say of all trees together what went."""
        tell = self._progress()
        sent = [self._data().send_tree(tree, where, tell, mapped, opened) for tree, where in self._trees]
        return self._told(functools.reduce(Shipped.plus, sent))

    def _written(self) -> tuple[set[Inode], set[Inode]]:
        """Return the files that the container may have written to without anybody being told, and those that it has open."""
        members = processes.family(self._pid)
        mapped, opened = processes.written(members)
        if self._overlay is not None:
            mapped |= source_layers.mapped(self._overlay, members, self._trees[-1][0])
        return mapped, opened

    def _removals(self) -> list[Callable[[], None]]:
        """Return what removes the bundle, the volumes that moved along, and what the root was made of."""

        def remove(path: str) -> None:
            volumes.remove(path, self._inodes.get(path), self._migration())

        root = functools.partial(source_layers.remove_root, self._overlay, self._bundle, remove)
        return [*(functools.partial(remove, path) for path in self._volumes), root]
