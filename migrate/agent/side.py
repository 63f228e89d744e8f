"""What the sides of an agent have in common: the container's lock, the working directory, and what is held."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from migrate import host, locks, mounts, netns, places
from migrate.command import Held
from migrate.errors import MigrateError, ProtocolError
from migrate.host import Address
from migrate.locks import Lock
from migrate.netns import Announcer
from migrate.network import Interface, Network
from migrate.wire import Wire

OnEvent = Callable[..., None]
DEFAULT_ROOT = "/var/lib/ferry/bundles"
_CHUNK = bytes(1 << 20)
_DONE_S = 60.0
_FLAGS = {"--tcp-established", "--tcp-close", "--link-remap", "--ext-unix-sk", "--shell-job", "--file-locks"}


@dataclass(frozen=True, slots=True)
class Permissions:
    """What the one who may start this agent may have it do.

    Who has a shell here can do anything without us. A key with a forced command has only this agent: it writes bundles below
    `roots` alone, names no command to run, and with a `role`, source or target, does the other one's part not at all.
    """

    roots: tuple[str, ...] = ()
    restricted: bool = False
    role: str = ""

    @classmethod
    def of(cls, only_below: list[str], role: str, forced: bool) -> Self:
        restricted = forced or bool(only_below or role)
        roots = tuple(only_below) or ((DEFAULT_ROOT,) if restricted else ())
        return cls(roots, restricted, role)

    def require_command(self, remote_command: Any) -> None:
        """Raises: ProtocolError for a command to run on another host that may not be named here."""
        if self.restricted and remote_command not in (None, "migrate"):
            raise ProtocolError("this agent may not be told which command to run on another host")

    def require_role(self, role: str) -> None:
        """Raises: ProtocolError for what is the part of a role that is not allowed; "" is anybody's part."""
        if self.role and role and role != self.role:
            raise ProtocolError(f"this agent may be the {self.role} of a move only")

    def require_bundle(self, bundle: str) -> Path:
        """Return the path of a bundle that may be written here. Raises: ProtocolError."""
        if not isinstance(bundle, str) or not os.path.isabs(bundle) or os.path.normpath(bundle) != bundle or "\0" in bundle:
            raise ProtocolError(f"{bundle!r} is no absolute path")
        if bundle == "/":
            raise ProtocolError("the root directory is no bundle")
        # What is there already may be links; what is not there will be made by us.
        real = os.path.realpath(bundle)
        if self.roots and not any(real.startswith(os.path.realpath(r).rstrip("/") + "/") for r in self.roots):
            raise ProtocolError(f"bundles may be written below {', '.join(self.roots)} only, not at {bundle}")
        return Path(bundle)


def checked_flags(flags: list[str]) -> list[str]:
    """Return the flags for CRIU, all of which must be known. Raises: ProtocolError."""
    if unknown := set(flags) - _FLAGS:
        raise ProtocolError(f"unknown flags {sorted(map(str, unknown))}")
    return list(flags)


def wipe(directory: Path) -> None:
    """Overwrite and remove what a move left in its working directory: the images hold the memory's secrets. Idempotent."""
    for base, _, names in os.walk(directory):
        for name in names:
            try:
                fd = os.open(os.path.join(base, name), os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                continue  # a socket, or a pipe that nobody reads
            try:
                left = os.fstat(fd).st_size
                while left > 0:
                    left -= os.write(fd, _CHUNK[: min(left, len(_CHUNK))])
            except OSError:
                pass
            finally:
                os.close(fd)
    shutil.rmtree(directory, ignore_errors=True)


def network_of(document: Any) -> Network | None:
    """Read the network namespace that moves along, if one does. Raises: ProtocolError."""
    try:
        return Network.from_json(document) if document else None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ProtocolError(f"the network that is to move along is none: {e}") from e


class Side:
    """One side of an agent. `on_event` reports on the call that is under way."""

    def __init__(self, wire: Wire, on_event: OnEvent, permissions: Permissions) -> None:
        self.wire, self._on_event, self._permissions = wire, on_event, permissions
        self._id: str | None = None
        self._container = ""
        self._lock: Lock | None = None
        self._slot: Lock | None = None
        self._held: Held | None = None
        self._network: Network | None = None
        self._joints: list[Interface] = []  # of the network and this host
        self._announcer: Announcer | None = None
        self._shared: tuple[str, ...] = ()  # volumes that are the same storage on both hosts

    def before(self, verb: str) -> None:
        """Called before each verb of this side. Raises: MigrateError when it is not to be done."""

    def stream_lost(self) -> None:
        """The coordinator is gone: let go of what is undecided. Raises: MigrateError, OSError."""

    def _migration(self) -> str:
        if self._id is None:
            raise ProtocolError("no move was begun with this agent")
        return self._id

    def _take(self, migration_id: str, container: str, coordinator: str, timeout_s: float = 0.2, *, new: bool = False) -> None:
        """Take the container's lock and a slot, and make the working directory; nothing is left when that fails.

        That of a `new` move must not be there: it would be another one's.
        """
        if self._id is not None:
            raise ProtocolError("this agent has a move already")
        working = places.working(migration_id)
        owner = locks.owner(migration_id, coordinator)
        self._lock = locks.take(container, owner, timeout_s)
        try:
            self._slot = locks.take_slot(owner)
            working.mkdir(mode=0o700, exist_ok=not new)
            places.images(migration_id).mkdir(mode=0o700, exist_ok=not new)
        except BaseException as e:
            self._unlock()
            if isinstance(e, OSError):
                raise MigrateError(f"cannot make {working}: {e.strerror}") from e
            raise
        self._id, self._container = migration_id, container

    def _unlock(self) -> None:
        for lock in (self._slot, self._lock):
            if lock is not None:
                lock.release()
        self._slot = self._lock = None

    def _leave(self) -> None:
        """Wipe the working directory, and give the locks back. Idempotent."""
        if self._id is not None:
            wipe(places.working(self._id))
            self._unlock()
            self._id = None

    def _hold(self) -> Held:
        if self._held is None:
            raise ProtocolError("nothing is held")
        return self._held

    def _start_hold(self, arguments: list[str], flags: list[str], inherited: tuple[int, ...] = ()) -> Held:
        assert self._lock is not None
        # The lock is theirs, too: while one of them lives, nobody else acts on the container.
        self._held = Held([*arguments, *checked_flags(flags)], self._container, (self._lock.fd, *inherited))
        return self._held

    def _find_joints(self) -> None:
        """Look where the network is joined to this host: so early that nobody waits for it. Raises: NetworkFailed."""
        if self._network is not None:
            self._joints = netns.joints(self._network.name)

    def _start_announcer(self, network: Network) -> Announcer:
        if self._announcer is None:
            self._announcer = Announcer(network.name)
        return self._announcer

    def _end_announcer(self) -> None:
        if self._announcer is not None:
            self._announcer.close()
            self._announcer = None

    def _join_network(self) -> None:
        """Let the container's network be heard, and tell its neighbours where it is. Idempotent. Raises: NetworkFailed."""
        if self._network is None:
            return
        announcer = self._start_announcer(self._network)
        if not self._joints:
            self._find_joints()
        netns.connect(self._joints)
        announcer.announce(self._network)

    def _connection(self, address: dict[str, Any], remote_command: str) -> list[str]:
        """Return the command that leads from here to an agent on another host. Raises: ProtocolError."""
        where = Address.from_json(address)
        self._permissions.require_command(remote_command)
        return host.bulk_command(where, f"{remote_command} agent")

    def _require_shared(self, path: str) -> None:
        if path not in self._shared:
            raise ProtocolError(f"{path} is not a volume that is to be shared")

    def storage(self, path: str) -> dict[str, Any]:
        """Say what tells a shared volume from all others, where its file system does; "" where it does not."""
        self._require_shared(path)
        return {"storage": mounts.storage(path)}

    def done(self) -> dict[str, Any]:
        """Wait for the end of what was released or killed. Returns CRIU's statistics."""
        held = self._hold()
        event = held.event("done", _DONE_S)
        held.end()
        self._held = None
        return {"stats": event.get("stats", {})}
