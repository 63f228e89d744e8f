"""The target's side of a move: what is made here is undecided until the source's decision is known.

    nothing -> made -> prepared -> released -> ran
                 |         |
                 |         +-> waits, when its coordinator is gone: only the source's disk knows what was decided
                 +-> discarded

The word `released` is on disk before the first instruction of the container; `ran` is written after it, and may be lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from migrate import backlog, command, durable, locks, netns, places, records
from migrate.agent.bulk import ALLOWED
from migrate.agent.made import Made
from migrate.agent.side import checked_flags, network_of, wipe
from migrate.agent.target_memory import TargetMemory
from migrate.errors import Locked, MigrateError, NetworkFailed, ProtocolError, RuntimeFailed, TransferFailed
from migrate.recover import Target, on_target
from migrate.warm import warm

_HOLD_READY_S, _RESTORE_S, _RELEASE_S, _VERDICT_S, _HEARD_S = 60.0, 600.0, 60.0, 120.0, 30.0
_LOOK_S = 0.05
_SEEN_S = 5.0  # what a file system that hosts share may take to show it


class TargetSide(TargetMemory):
    _bundle = ""
    _made: tuple[Made, ...] = ()
    _network_inode: int | None = None
    _prepared = False
    _confirmed = False
    _taken_over = False
    _waiting = ""  # the move of another agent here that waits for a verdict

    def prepare(
        self,
        migration_id: str,
        container: str,
        bundle: str,
        origin: dict[str, Any],
        coordinator: str,
        network: dict[str, Any] | None = None,
        volumes: tuple[str, ...] = (),
        shared: tuple[str, ...] = (),
        overlay: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Take the lock, note what will be made, and make the bundle's directory, its volumes', and the network, which is silent.

        Returns the layers of the overlay that this host has not: where each is to be sent, by its digest.

        Raises: MigrateError; nothing is left then.
        """
        wanted = network_of(network)
        self._permissions.require_bundle(bundle)
        own = self._plan_overlay(overlay, bundle, migration_id)
        paths = [self._permissions.require_bundle(p) for p in (bundle, *volumes, *own)]
        self._permissions.require_command(origin.get("remote_command"))
        self._take(migration_id, container, coordinator, new=True)
        try:
            records.require_settled(container)
            if command.state(container) is not None:
                raise MigrateError(f"there is a container {container} already", hint="delete it, or see: migrate status")
            for path in paths:
                if os.path.lexists(path):
                    raise MigrateError(f"{path} is there already", hint="move it away, or delete it")
            if wanted is not None and netns.exists(wanted.name):
                raise NetworkFailed(
                    f"there is a network namespace {wanted.name} already", hint="remove it, or see: ip netns list"
                )
            directory = records.make(migration_id)
        except BaseException:
            self._leave()
            raise
        self._bundle, self._shared = bundle, tuple(map(str, shared))
        self._made = tuple(Made.planned(path) for path in paths)
        note = {
            **{k: origin.get(k) for k in ("source", "target", "source_address", "remote_command")},
            "container": container,
            "bundle": bundle,
            "boot_id": locks.boot_id(),
            "network": network,
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        try:
            durable.create(directory / "released", durable.UNDECIDED)
            self._note(directory, {**note, "made": [m.as_dict() for m in self._made], **self._overlay_note()})
            for made in self._made:
                made.make()
            self._make_layers()
            if wanted is not None:
                netns.make(wanted)
                self._network, self._network_inode = wanted, netns.inode(wanted.name)
            made_now = {"made": [m.as_dict() for m in self._made], "network_inode": self._network_inode, **self._overlay_note()}
            self._note(directory, {**note, **made_now})
            self._allow([bundle, *volumes, *self._fill()])
        except (OSError, NetworkFailed, TransferFailed) as e:
            with contextlib.suppress(MigrateError):
                self.discard()
            if isinstance(e, MigrateError):
                raise
            raise MigrateError(f"cannot prepare {bundle}: {e.strerror}") from e
        return {"layers": {digest: made.path for digest, made in self._coming.items()}}

    def sees(self, path: str, mtime_s: int) -> dict[str, Any]:
        """Say whether a shared volume was modified at that time, which another host has just made it be."""
        self._require_shared(path)
        deadline = time.monotonic() + _SEEN_S
        while True:
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # a mere look may be an old one
                try:
                    if int(os.fstat(fd).st_mtime) == mtime_s:
                        return {"seen": True}
                finally:
                    os.close(fd)
            if time.monotonic() > deadline:
                return {"seen": False}
            time.sleep(_LOOK_S)

    def _allow(self, roots: list[str]) -> None:
        """Say to whom it may concern what the source may write to."""
        (places.working(self._migration()) / ALLOWED).write_text(json.dumps(roots))

    def keep_layers(self) -> None:
        """Put the layers that have come into the store. Raises: TransferFailed when one is not what it was said to be."""
        filled = [self._overlay.upper] if self._overlay else []
        self._allow([*(m.path for m in self._made if m.path != self._beside), *filled])
        self._keep_layers()

    @staticmethod
    def _note(directory: Path, note: dict[str, Any]) -> None:
        path = directory / "target.json"
        with path.with_suffix(".new").open("w") as f:
            f.write(json.dumps(note) + "\n")
            f.flush()
            os.fsync(f.fileno())
        path.with_suffix(".new").rename(path)
        durable.sync_directory(directory)

    def hold_restore(self, flags: list[str], memory_bytes: int = 0, pre_copy: bool = False) -> None:
        """Start the restore: everything but the images is ready. With `pre_copy` the memory comes before them."""
        migration = self._migration()
        self._try_root()
        arguments = ["restore", "--detach", "--image-path", str(places.images(migration)), "--bundle", self._bundle]
        arguments += ["--decision", str(places.released(migration)), *(["--mounted-root"] if self._overlay else [])]
        if pre_copy:
            # Its memory is filled in while it runs: nobody else is to overwrite what that is read from.
            arguments += ["--wipe", "--memory-requests", str(places.requests(migration))]
            self._drain_fd, theirs = os.pipe()
            try:
                held = self._start_hold([*arguments, "--drained-fd", str(theirs)], flags, (theirs,))
            finally:
                os.close(theirs)
        else:
            held = self._start_hold(arguments, flags)
        held.event("ready", _HOLD_READY_S)
        if self._network is not None:
            self._find_joints()
            if len(self._joints) != len(self._network.interfaces):
                raise NetworkFailed(f"the network {self._network.name} is not what it was made as: is its bridge still there?")
            self._start_announcer(self._network)
        if not pre_copy:
            warm(2 * memory_bytes)  # for the images, and for the processes

    def restore(self) -> dict[str, Any]:
        """Restore, up to where only the decision is missing. From then on this host does not let go of it by itself."""
        held = self._hold()
        (places.working(self._migration()) / ALLOWED).unlink(missing_ok=True)  # all is here, and from now on it may run
        started = time.monotonic()
        self._mount_root(self._bundle)
        held.say("go")
        told = held.event("held", _RESTORE_S)
        elapsed_s, criu_s = time.monotonic() - started, told.get("criu_seconds", 0.0)
        (places.working(self._migration()) / "prepared").touch()
        self._prepared = True
        spans = [["prepare the restore", 0, elapsed_s - criu_s], ["restore", elapsed_s - criu_s, criu_s]]
        return {"pid": told["pid"], "spans": spans}

    def release(self, frames: Any = ()) -> dict[str, Any]:
        """Let the restored container run, which was decided, and give it what has come for it meanwhile.

        Returns how many frames it was given. Raises: MigrateError; nothing of it has run then.
        """
        held = self._hold()
        waiting = backlog.read(frames, self._joints)
        given = 0
        word = places.released(self._migration())
        self._write_released(word)
        self._released = True
        held.say("commit")
        try:
            self._join_network()
            given = backlog.deliver(waiting)
            held.event("resumed", _RELEASE_S)
        except RuntimeFailed:
            if held.alive():
                raise  # it has been told, and may let go at any moment
            state = command.state(self._container)
            if state is None or state["status"] == "paused":
                self._released = False
                durable.write(word, durable.UNDECIDED)
                with contextlib.suppress(NetworkFailed):
                    netns.disconnect(self._joints)
                raise
            # Who held it ended after it had let go.
        self._ran(word)
        return {"frames": given}

    def deliver(self, frames: Any) -> dict[str, Any]:
        """Give the container, which runs here, what has come for it on the source. Returns how many frames it was given."""
        if not self._released:
            raise ProtocolError("the container was not released here")
        return {"frames": backlog.deliver(backlog.read(frames, self._joints))}

    @staticmethod
    def _ran(word: Path) -> None:
        with contextlib.suppress(OSError):
            durable.write(word, durable.RAN, sync=False)

    @staticmethod
    def _write_released(word: Path) -> None:
        try:
            durable.write(word, durable.RELEASED)
        except OSError:
            with contextlib.suppress(OSError):
                durable.write(word, durable.UNDECIDED)
            raise

    def settle(self) -> None:
        """Have the target's files on disk, and its network joined, before the source's go. Raises: NetworkFailed."""
        if self._taken_over:
            self._join_network()  # whoever released it may have been killed before it had done so
        if self._network is not None:
            with contextlib.suppress(NetworkFailed):  # it is reached all the same
                netns.calm(self._network)
        os.sync()

    def confirm(self) -> None:
        """The source's copy is dead, and its journal says so: the move is over here, too. Idempotent."""
        if self._confirmed:
            return
        migration = self._migration()
        if not records.was_released(migration):
            raise ProtocolError("the container was not released here")
        wipe(places.working(migration))
        records.close(migration)
        self._leave()
        self._confirmed = True

    def abort(self) -> None:
        """Kill what was restored and is held. Idempotent."""
        if self._released:
            raise ProtocolError("the container runs here: it is not aborted")
        if self._held is not None:
            self._held.say("abort")
            self._held.end()
            self._held = None
        self._prepared = False

    def discard(self, keep_record: bool = False) -> None:
        """Remove all that was made on the target, but the record when it is to tell that nothing ran here. Idempotent.

        Raises: MigrateError with what could not be removed.
        """
        if self._released:
            raise ProtocolError("the container runs here: nothing of it is discarded")
        if self._id is None:
            return
        self.abort()
        self._close_drain()
        state = command.state(self._container)
        if state is not None and state["bundle"] == self._bundle:  # not one that somebody made meanwhile
            command.run("delete", "--force", self._container)
        wipe(places.working(self._id))
        self._unmount_root()
        for made in self._made:
            made.remove()
        self._remove_layers()
        self._remove_network()
        if keep_record:
            records.close(self._id)
        else:
            records.remove(self._id)
        self._leave()

    def _remove_network(self) -> None:
        """Remove the network that was made here, not one that somebody else made. Raises: NetworkFailed."""
        self._end_announcer()
        if self._network is not None and netns.exists(self._network.name):
            found = netns.inode(self._network.name)
            # Made, but not noted: then nobody uses it.
            if found == self._network_inode if self._network_inode is not None else not netns.users(self._network.name):
                netns.remove(self._network.name)

    def stream_lost(self) -> None:
        if self._id is None:
            return
        if self._released:
            if self._held is not None:
                self._held.end()
            self._see_filled()
            self._leave()
        elif self._taken_over:
            if self._held is not None:
                self._held.end()
            if (places.history(self._id) / "open").exists():
                self._unlock()  # the next one who takes over finds it as it is
            else:
                self._leave()
        elif self._prepared:
            self._wait_for_verdict()
        else:
            self.discard()

    def _wait_for_verdict(self) -> None:
        """Keep what is prepared until somebody brings the source's decision, or it has ended by itself."""
        working = places.working(self._migration())
        verdict = working / "verdict"
        (working / "waiting").touch()
        while not verdict.exists():
            time.sleep(_LOOK_S)
            if self._held is None or not self._held.running():
                self._unlock()
                return
        word = verdict.read_text()
        (working / "waiting").unlink(missing_ok=True)  # whoever told us waits for our end from here on
        if word == "commit":
            self.release()
            self.done()
            self._see_filled()
            self._leave()
        else:
            self.discard(keep_record=True)

    def take_over(self, migration_id: str, container: str, coordinator: str, wait_s: float) -> dict[str, Any]:
        """Take on a move that was left behind, and say what of it is here.

        "held" without our having its lock: an agent of the move is there, and waits for the verdict.

        Raises: Locked when it is under way still.
        """
        directory = places.history(migration_id)
        if not directory.exists():
            return {"state": "absent", "known": False}
        if not self._was_made(directory):
            self._take(migration_id, container, coordinator, min(float(wait_s), 900.0))
            records.remove(migration_id)
            self._leave()
            return {"state": "absent", "known": True}
        found = records.target(directory)
        if found["container"] != container:
            raise ProtocolError(f"{migration_id} is not a move of {container}")
        deadline = time.monotonic() + min(float(wait_s), 900.0)
        while self._id is None:
            if (places.working(migration_id) / "waiting").exists() and locks.holder(container) is not None:
                self._waiting, self._container = migration_id, container
                return {"state": "held", "known": True}
            with contextlib.suppress(Locked):
                self._take(migration_id, container, coordinator)
                break
            if time.monotonic() > deadline:
                self._take(migration_id, container, coordinator)
        self._taken_over = True
        # Of one that waited and has ended: from here on the lock is ours, and nobody waits for a verdict.
        (places.working(migration_id) / "waiting").unlink(missing_ok=True)
        if not directory.exists():  # whoever had the lock has discarded all of it
            self._leave()
            return {"state": "absent", "known": True}
        return {"state": self._adopt(records.target(directory)), "known": True}

    @staticmethod
    def _was_made(directory: Path) -> bool:
        """Say whether a move got as far as its note; before that nothing else was made."""
        return (directory / "target.json").exists() or durable.read(directory / "released") not in (None, durable.UNDECIDED)

    def _adopt(self, note: dict[str, Any]) -> str:
        """Read what was noted; return what is here, a value of Target. Raises: MigrateError when that cannot be known."""
        migration = self._migration()
        self._bundle, self._made = note["bundle"], _made_of(note)
        self._adopt_overlay(note)
        network = network_of(note.get("network"))
        if note.get("boot_id") == locks.boot_id():
            self._network, self._network_inode = network, note.get("network_inode")
        elif network is not None:
            netns.forget(network.name)
        word = durable.read(places.released(migration))
        state = command.state(self._container)
        # One of another bundle is another container that has taken the name.
        status = None if state is None or state["bundle"] != self._bundle else str(state["status"])
        prepared = (places.working(migration) / "prepared").exists()
        found = on_target(status, word, note.get("boot_id") == locks.boot_id(), prepared)
        if found is None:
            raise MigrateError(
                f"it is not known whether {self._container} was let run here: it is {status or 'gone'}, "
                f"and {places.released(migration)} says {word!r}",
                hint=f"runtime state {self._container} shows what is here",
            )
        released = word not in (None, durable.UNDECIDED)
        if "ferry.failure" in (state or {}).get("annotations", {}):
            # It is killed, or is dying yet, since its memory could not be completed.
            found = Target.CRASHED if released else Target.ABSENT
        elif not released and self._lacks_memory():
            found = Target.ABSENT  # nobody has the rest of its memory any more: it will never run
        if found == Target.RUNNING:
            self._released = True
            self._ran(places.released(migration))  # also when it was somebody else who let it
        return found

    def verdict(self, word: str) -> None:
        """Carry out the source's decision on what is held here: commit or abort. Raises: MigrateError."""
        if word not in ("commit", "abort"):
            raise ProtocolError(f"{word!r} is no verdict")
        if self._waiting:
            self._tell(word)
        elif word == "abort":
            self.discard(keep_record=True)
        else:
            self._write_released(places.released(self._migration()))
            self._released = True
            command.run("resume", self._container)
            self._ran(places.released(self._migration()))

    def _tell(self, word: str) -> None:
        migration, self._waiting = self._waiting, ""
        path = places.working(migration) / "verdict"
        path.with_suffix(".new").write_text(word)
        path.with_suffix(".new").rename(path)
        deadline = time.monotonic() + _HEARD_S
        while (path.parent / "waiting").exists() and locks.holder(self._container) is not None:
            if time.monotonic() > deadline:
                raise RuntimeFailed(f"the agent that holds {self._container} does not hear what was decided")
            time.sleep(_LOOK_S)
        found = self.take_over(migration, self._container, "", _VERDICT_S)["state"]
        if word == "commit" and found not in ("running", "ended"):
            raise RuntimeFailed(f"{self._container} could not be released: it is {found}")
        if word == "abort" and found != "absent":
            raise RuntimeFailed(f"{self._container} could not be discarded: it is {found}")

    def restore_again(self, flags: list[str]) -> None:
        """Restore from the images that are kept here, and let it run: it was decided, and the source's copy is gone."""
        checked_flags(flags)
        self.hold_restore(flags, pre_copy=any(places.images(self._migration()).glob("memory-*.img")))
        self.restore()
        self.release()
        self.done()


def _made_of(note: dict[str, Any]) -> tuple[Made, ...]:
    try:
        return tuple(Made.from_json(m) for m in note.get("made") or ())
    except (KeyError, TypeError) as e:
        raise MigrateError(f"the note of what was made here is damaged: {e}") from e
