"""The process that a move starts on each host: it serves one coordinator over stdin and stdout, and one move.

    python -m migrate.agent     on this host, as a child
    ssh HOST migrate agent      on another host: one for control, and on the target a second one for bulk data

It has a single thread and one call at a time. When its stream ends, whoever was there is gone: what is undecided
is let go, and what was prepared here is discarded.

Every verb stands in VERBS, with its time-out and whether it may be repeated. Nothing else can be asked of an agent.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from migrate import command, places, probe
from migrate.command import Held
from migrate.errors import ConnectionLost, Locked, MigrateError, ProtocolError, RuntimeFailed, TransferFailed
from migrate.facts import to_json
from migrate.rootfs import TreeReceiver
from migrate.ship import Shipper
from migrate.transport.local import FdStream
from migrate.warm import warm
from migrate.wire import Wire, greet
from migrate.wire_pb2 import Event, Failure, Frame, Reply

_IDLE_TIMEOUT_S = 30.0
_HOLD_READY_S, _FROZEN_S, _DUMP_S, _RESTORE_S, _RELEASE_S = 60.0, 30.0, 600.0, 600.0, 60.0
_MARK = "target.json"


class Agent:
    """The verbs, and what one move has made on this host so far."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._call_id = 0
        self._id: str | None = None
        self._container = ""
        self._lock_fd: int | None = None
        self._made_bundle: Path | None = None
        self._made_parents: list[Path] = []
        self._receives_into: tuple[str, ...] = ()
        self._held: Held | None = None
        self._shipper: Shipper | None = None
        self._released = False
        self._decided = False
        self._pid = 0

    def serve(self) -> None:
        """Answer calls until the stream ends; then let go of everything."""
        try:
            greet(self.wire, "the coordinator")
            while True:
                frame = self.wire.receive()
                if frame.WhichOneof("body") != "call":
                    raise ProtocolError("a call was expected")
                self._answer(frame)
        except (ConnectionLost, ProtocolError):
            pass
        finally:
            self._let_go_of_everything()

    def _answer(self, frame: Frame) -> None:
        call = frame.call
        self._call_id = call.id
        verb = VERBS.get(call.verb)
        try:
            if verb is None:
                raise ProtocolError(f"there is no verb {call.verb!r}")
            try:
                result = verb.handler(self, **json.loads(call.arguments or "{}"))
            except (TypeError, ValueError, KeyError) as e:
                raise ProtocolError(f"{call.verb}: {e}") from e
            except OSError as e:
                raise MigrateError(f"{call.verb}: {e.filename or 'system call'}: {e.strerror}") from e
            reply = Frame(reply=Reply(id=call.id, result=json.dumps(result or {})))
        except ConnectionLost as e:
            # Ours to the coordinator, or the data connection: the coordinator is told of the latter.
            reply = Frame(failure=Failure(id=call.id, error=json.dumps(e.as_dict())))
        except MigrateError as e:
            reply = Frame(failure=Failure(id=call.id, error=json.dumps(e.as_dict())))
        self.wire.send(reply)

    def _event(self, name: str, **fields: Any) -> None:
        self.wire.send(Frame(event=Event(id=self._call_id, name=name, fields=json.dumps(fields))))

    def _let_go_of_everything(self) -> None:
        with contextlib.suppress(MigrateError, OSError):
            if self._decided and self._held:
                # Whether the target runs is not known here: EOF makes the holder leave the container frozen.
                self._held.end()
            else:
                self.abort()
        if self._shipper:
            self._shipper.close()
        if self._made_bundle and not self._released:
            with contextlib.suppress(MigrateError, OSError):
                self.discard()
        if self._id and self._lock_fd is not None:
            with contextlib.suppress(MigrateError, OSError):
                self.leave()

    def ping(self) -> None:
        """Say that the coordinator is there."""

    def facts(
        self,
        bundle: str | None = None,
        bind_sources: tuple[str, ...] = (),
        container: str | None = None,
        cpu: str | None = None,
    ) -> dict[str, Any]:
        return to_json(probe.host_facts(bundle, list(bind_sources), container, cpu))

    def container(self, container: str, flags: list[str]) -> dict[str, Any]:
        facts = probe.container_facts(container, _checked(flags))
        return {"container": None if facts is None else to_json(facts)}

    def containers(self) -> dict[str, Any]:
        return {"containers": probe.list_containers()}

    def begin(self, migration_id: str, container: str) -> None:
        """Take the container's lock on this host, and make the working directory."""
        working = places.working(migration_id)
        if "/" in container or container in ("", ".", ".."):
            raise ProtocolError(f"{container!r} is no container id")
        lock = places.lock(container)
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = os.read(fd, 100).decode(errors="replace").strip()
                os.close(fd)
                raise Locked(f"container {container} is being moved already{f' by {other}' if other else ''}") from None
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == os.stat(lock).st_ino:
                    break
            os.close(fd)  # its holder removed it when it ended: that one guards nothing
        try:
            os.ftruncate(fd, 0)
            os.write(fd, migration_id.encode())
            working.mkdir(mode=0o700)
        except OSError as e:
            os.close(fd)
            raise MigrateError(f"cannot make {working}: {e.strerror}") from e
        self._lock_fd, self._id, self._container = fd, migration_id, container
        places.images(migration_id).mkdir(mode=0o700)

    def leave(self) -> None:
        """Remove the working directory, and give the lock back. Idempotent."""
        if self._id is None:
            return
        shutil.rmtree(places.working(self._id), ignore_errors=True)
        if self._lock_fd is not None:
            places.lock(self._container).unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = None

    def _migration(self) -> str:
        if self._id is None:
            raise ProtocolError("begin was not called")
        return self._id

    def prepare(self, bundle: str) -> None:
        """Make the bundle's directory on the target; it must not be there."""
        working = places.working(self._migration())
        path = Path(bundle)
        if not path.is_absolute() or os.path.normpath(bundle) != bundle:
            raise ProtocolError(f"{bundle!r} is no absolute path")
        parents = []
        parent = path.parent
        while not parent.exists():
            parents.append(parent)
            parent = parent.parent
        for parent in reversed(parents):
            parent.mkdir(mode=0o755)
            self._made_parents.insert(0, parent)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise MigrateError(f"{bundle} is there already", hint="move it away, or delete it") from None
        self._made_bundle = path
        (working / _MARK).write_text(json.dumps([bundle, str(places.images(self._migration()))]))

    def attach(self, migration_id: str) -> None:
        """Make this agent the bulk end of a move that another agent of this host has prepared."""
        try:
            allowed = json.loads((places.working(migration_id) / _MARK).read_text())
        except OSError as e:
            raise ProtocolError(f"no move {migration_id} was prepared here") from e
        self._receives_into = tuple(allowed)
        # The other side may scan, dump or wait for long without a word; a connection that is dead is ssh's to tell.
        self._stream_timeout(None)

    def _stream_timeout(self, seconds: float | None) -> None:
        stream = self.wire.stream
        if isinstance(stream, FdStream):
            stream.timeout_s = seconds

    def receive_tree(self, root: str) -> dict[str, Any]:
        """Take a tree into one of the directories that were prepared for it."""
        if root not in self._receives_into:
            raise ProtocolError(f"{root} was not prepared for this move")
        receiver = TreeReceiver(Path(root))
        try:
            receiver.receive(self.wire)
        finally:
            receiver.close()
        return {"entries": receiver.entries, "content_bytes": receiver.content_bytes}

    def open_data(self, argv: list[str], name: str) -> None:
        """Connect to the target's second agent."""
        self._shipper = Shipper(argv, name)
        self._shipper.call("attach", {"migration_id": self._migration()})

    def _data(self) -> Shipper:
        if self._shipper is None:
            raise ProtocolError("open_data was not called")
        return self._shipper

    def _ship(self, root: str, target_root: str) -> dict[str, Any]:
        shipper = self._data()
        last = [time.monotonic(), 0]

        def progress(sent: int, total: int) -> None:
            now = time.monotonic()
            rate = (sent - last[1]) / max(now - last[0], 1e-6)
            last[:] = [now, sent]
            self._event("progress", sent_bytes=sent, total_bytes=total, rate=rate)

        shipped = shipper.send_tree(Path(root), target_root, progress)
        return {**asdict(shipped), "wire_bytes": shipper.wire_bytes}

    def ship_bundle(self, bundle: str) -> dict[str, Any]:
        """Make the target's copy of the bundle equal to what it is now."""
        return self._ship(bundle, bundle)

    def hold_checkpoint(self, container: str, flags: list[str], memory_bytes: int = 0) -> None:
        """Start the checkpoint: CRIU is ready, and the container untouched."""
        migration = self._migration()
        state = command.state(container)
        if state is None:
            raise RuntimeFailed(f"container does not exist: {container}")
        self._pid = state["pid"]
        arguments = [
            "checkpoint",
            "--image-path",
            str(places.images(migration)),
            "--decision",
            str(places.decision(migration)),
        ]
        self._held = Held([*arguments, *_checked(flags)], container)
        self._held.event("ready", _HOLD_READY_S)
        warm(memory_bytes)  # for the images

    def hold_restore(self, container: str, bundle: str, flags: list[str], memory_bytes: int = 0) -> None:
        """Start the restore: everything but the images is ready."""
        arguments = ["restore", "--detach", "--image-path", str(places.images(self._migration())), "--bundle", bundle]
        self._held = Held([*arguments, *_checked(flags)], container)
        self._held.event("ready", _HOLD_READY_S)
        warm(2 * memory_bytes)  # for the images, and for the processes

    def _hold(self) -> Held:
        if self._held is None:
            raise ProtocolError("nothing is held")
        return self._held

    def freeze(self, bundle: str) -> dict[str, Any]:
        """Freeze the container and dump it; what changed in its files, and its memory, go to the target meanwhile."""
        started = time.monotonic()
        held = self._hold()
        held.say("go")
        held.event("frozen", _FROZEN_S)
        frozen = time.monotonic()
        # A shared mapping is written to without a trace in the file's times: what is mapped so is always sent again.
        self._data().distrust(bundle, probe.shared_mappings(self._pid))
        delta = self._ship(bundle, bundle)
        shipped = time.monotonic()
        images = places.images(self._migration())
        deadline = shipped + _DUMP_S
        pages = self._data().stream_pages(images, str(images), lambda s: held.has_event(s) or time.monotonic() > deadline)
        held.event("held", 0)
        return {
            "delta": delta,
            "pages": {**asdict(pages), "wire_bytes": self._data().wire_bytes},
            "freeze_ms": (frozen - started) * 1000,
            "delta_ms": (shipped - frozen) * 1000,
            "dump_ms": (time.monotonic() - frozen) * 1000,
        }

    def ship_images(self) -> dict[str, Any]:
        """Send the rest of the checkpoint: all but its memory."""
        images = str(places.images(self._migration()))
        return self._ship(images, images)

    def restore(self) -> dict[str, Any]:
        """Restore, up to where only the decision is missing."""
        held = self._hold()
        held.say("go")
        return {"pid": held.event("held", _RESTORE_S)["pid"]}

    def decide(self) -> None:
        """Write the decision to commit where it survives everything that the source does."""
        path = places.decision(self._migration())
        self._decided = True
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"commit\n")
            os.fsync(fd)
        finally:
            os.close(fd)

    def revoke(self) -> None:
        """Take the decision back: it is certain that the target does not run. Idempotent."""
        path = places.decision(self._migration())
        path.unlink(missing_ok=True)
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self._decided = False

    def release(self) -> None:
        """Let the restored container run."""
        held = self._hold()
        self._released = True
        held.say("commit")
        try:
            held.event("resumed", _RELEASE_S)
        except RuntimeFailed:
            self._released = held.alive()  # one that has ended let go: nothing of it runs
            raise

    def kill(self) -> None:
        """Let CRIU kill the dumped container."""
        self._hold().say("commit")

    def done(self) -> dict[str, Any]:
        """Wait for the end of what was released or killed. Returns CRIU's statistics."""
        held = self._hold()
        event = held.event("done", _RELEASE_S)
        held.end()
        self._held = None
        return {"stats": event.get("stats", {})}

    def abort(self) -> None:
        """Let go of what is held: a checkpointed container runs on, a restored one is killed. Idempotent."""
        if self._held is None:
            return
        self._held.say("abort")
        if not self._held.end() and (state := command.state(self._container)) and state["status"] == "paused":
            # It had to be killed before it could thaw what it had frozen; what it had restored is only discarded.
            command.run("delete", "--force", self._container) if self._made_bundle else command.run("resume", self._container)
        self._held = None

    def discard(self) -> None:
        """Remove all that was made on the target. Idempotent."""
        if self._released:
            raise ProtocolError("the container runs here: nothing of it is discarded")
        self.abort()
        if self._made_bundle is not None:
            if inside := probe.mounts_below(self._made_bundle):
                raise TransferFailed(f"{self._made_bundle} is kept: {inside[0]} is mounted in it", hint="remove it by hand")
            shutil.rmtree(self._made_bundle, ignore_errors=True)
            if self._made_bundle.exists():
                raise TransferFailed(f"cannot remove {self._made_bundle}", hint="remove it by hand")
            self._made_bundle = None
        for parent in self._made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        self._made_parents = []
        self.leave()

    def settle(self) -> None:
        """Have the target's files on disk before the source's go."""
        os.sync()

    def forget(self, container: str, bundle: str | None) -> None:
        """Delete the source's container, and its bundle unless that is None. Idempotent."""
        with contextlib.suppress(RuntimeFailed):
            command.run("delete", container)
        if command.state(container) is not None:
            raise RuntimeFailed(f"container {container} could not be deleted", hint=f"runtime delete --force {container}")
        if bundle is None or not os.path.lexists(bundle):
            return
        if inside := probe.mounts_below(Path(bundle)):
            raise MigrateError(
                f"{bundle} is kept: {inside[0]} is mounted in it", hint="unmount it, then remove the bundle by hand"
            )
        # Renamed first, so that a half-deleted bundle is never taken for a whole one.
        gone = f"{bundle}.{self._migration()}"
        os.rename(bundle, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def status(self, container: str) -> dict[str, Any]:
        """Return the container's state document."""
        return {"state": command.state(container)}


def _checked(flags: list[str]) -> list[str]:
    """Return the flags, all of which must be known. Raises: ProtocolError."""
    known = {"--tcp-established", "--tcp-close", "--link-remap", "--ext-unix-sk", "--shell-job", "--file-locks"}
    if unknown := set(flags) - known:
        raise ProtocolError(f"unknown flags {sorted(unknown)}")
    return list(flags)


@dataclass(frozen=True, slots=True)
class Verb:
    """Units: `timeout_s` is how long the coordinator waits for the answer."""

    handler: Callable[..., Any]
    timeout_s: float
    repeatable: bool


VERBS: dict[str, Verb] = {
    "ping": Verb(Agent.ping, 15, True),
    "facts": Verb(Agent.facts, 60, True),
    "container": Verb(Agent.container, 120, True),
    "list": Verb(Agent.containers, 60, True),
    "status": Verb(Agent.status, 60, True),
    "begin": Verb(Agent.begin, 30, False),
    "leave": Verb(Agent.leave, 60, True),
    "prepare": Verb(Agent.prepare, 30, False),
    "attach": Verb(Agent.attach, 30, True),
    "receive_tree": Verb(Agent.receive_tree, 60, False),
    "open_data": Verb(Agent.open_data, 60, False),
    "ship_bundle": Verb(Agent.ship_bundle, 120, True),
    "hold_checkpoint": Verb(Agent.hold_checkpoint, 90, False),
    "hold_restore": Verb(Agent.hold_restore, 90, False),
    "freeze": Verb(Agent.freeze, 600, False),
    "ship_images": Verb(Agent.ship_images, 120, True),
    "restore": Verb(Agent.restore, 600, False),
    "decide": Verb(Agent.decide, 30, False),
    "revoke": Verb(Agent.revoke, 30, True),
    "release": Verb(Agent.release, 90, False),
    "kill": Verb(Agent.kill, 30, False),
    "done": Verb(Agent.done, 90, False),
    "abort": Verb(Agent.abort, 60, True),
    "discard": Verb(Agent.discard, 120, True),
    "settle": Verb(Agent.settle, 300, True),
    "forget": Verb(Agent.forget, 300, True),
}


def main() -> None:
    """Serve one coordinator over stdin and stdout."""
    # A terminal's ^C is the coordinator's to decide on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    streams = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)  # whatever prints by mistake must not become a frame
    stream = FdStream(*streams, "the coordinator")
    stream.timeout_s = _IDLE_TIMEOUT_S
    Agent(Wire(stream)).serve()


if __name__ == "__main__":
    main()
