"""The source's side of a move: files and memory go out, and the decision is kept here."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrate import command, durable, locks, places, records
from migrate.agent import source_layers, volumes
from migrate.agent.serving import Serving
from migrate.agent.side import wipe
from migrate.agent.source_data import SourceData
from migrate.backlog import AT_ONCE_BYTES
from migrate.command import Held
from migrate.errors import ConnectionLost, MigrateError, ProtocolError, RuntimeFailed
from migrate.flush import Flushing
from migrate.journal import Journal
from migrate.recover import Decision
from migrate.transport.local import enlarge
from migrate.tree import Tree
from migrate.warm import warm

_HOLD_READY_S, _FROZEN_S, _DUMP_S, _TELL_S = 60.0, 30.0, 600.0, 0.2
_PAGE_BYTES, _WITH_HEADS = 4096, 1.1
# `migrate abort` has these refused. What undoes, and what follows the decision, is done.
_STOPPABLE = {
    "listen_data", "open_data", "ship_layers", "ship_bundle", "follow", "send_memory", "throttle", "hold_checkpoint", "freeze",
    "ship_images", "serve", "decide",
}  # fmt: skip


class SourceSide(SourceData):
    _journal: Journal | None = None
    _created = ""
    _memory_fd: int | None = None  # where the memory of what is held comes out, when it is sent while the container runs
    _passes = 0
    _slowed = False
    _serving: Serving | None = None
    _later_bytes = 0  # what it will send, about

    def before(self, verb: str) -> None:
        if verb in _STOPPABLE:
            self._stop_if_asked()

    def begin(self, migration_id: str, container: str, plan: dict[str, Any], coordinator: str) -> None:
        """Take the container's lock, and open the journal with the plan. Raises: MigrateError; nothing is left then."""
        places.lock(container)
        state = command.state(container)
        if state is None:
            raise RuntimeFailed(f"container does not exist: {container}")
        if plan.get("bundle") != state["bundle"] or plan.get("container") != container:
            raise ProtocolError(f"the plan is not for container {container} in {state['bundle']}")
        self._permissions.require_command(plan.get("remote_command"))
        moving, shared = volumes.checked(plan, state["bundle"])
        self._overlay = source_layers.checked(plan, state["rootfs"])
        own = source_layers.own_directories(self._overlay, state["bundle"])
        for path in (*moving, *own):
            self._permissions.require_bundle(path)  # it is removed, too, when the container runs elsewhere
        inode = self._take_network(plan, state["bundle"])
        self._take(migration_id, container, coordinator, new=True)
        directory: Path | None = None
        try:
            records.require_settled(container)
            directory = records.make(migration_id)
            durable.create(places.decision(migration_id), durable.UNDECIDED)
            self._journal = Journal(directory)
            self._inodes = {path: os.lstat(path).st_ino for path in (state["bundle"], *moving, *own)}
            noted = {
                "created": state.get("created", ""),
                "boot_id": locks.boot_id(),
                "network_inode": inode,
                "inodes": self._inodes,
            }
            self._journal.append("plan", "made", sync=True, **{**plan, **noted})
        except BaseException as e:
            if directory is not None:
                records.remove(migration_id)
            self._leave()
            if isinstance(e, OSError):
                raise MigrateError(f"cannot begin a journal: {e.strerror}", hint="is its disk full?") from e
            raise
        self._bundle, self._created, self._pid = state["bundle"], state.get("created", ""), state["pid"]
        self._volumes, self._shared = moving, shared

    def journal(self, phase: str, mark: str, sync: bool = False, fields: dict[str, Any] | None = None) -> None:
        """Append an entry to the journal."""
        if self._journal is None or phase in ("plan", "move"):
            raise ProtocolError("there is no journal for this entry")
        self._journal.append(str(phase), str(mark), sync=sync, **(fields or {}))

    def ended(self, outcome: str, settled: bool, fields: dict[str, Any], report: dict[str, Any]) -> None:
        """Write how the move ended; when it is settled, it is over, also where there was no space for the words.

        Raises: MigrateError.
        """
        migration = self._migration()
        errors = []
        try:
            if self._journal is not None:
                self._journal.append("move", "ended", sync=True, outcome=str(outcome), settled=settled, **fields)
        except MigrateError as e:
            errors.append(e)
        try:
            records.save_report(migration, report)
        except MigrateError as e:
            errors.append(e)
        if settled:
            # Whoever ends between the two leaves a move that is found again, never images that nobody knows of.
            wipe(places.working(migration))
            records.close(migration)
        if errors:
            raise errors[0]

    def leave(self) -> None:
        """Remove what the move had here while it went on. Idempotent."""
        self._close_memory()
        self._close_data()
        self._end_announcer()
        self._stamps.undo_all()
        if self._backlog is not None:
            self._backlog.close()
            self._backlog = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._leave()

    def _close_memory(self) -> None:
        if self._memory_fd is not None:
            os.close(self._memory_fd)
            self._memory_fd = None

    def stream_lost(self) -> None:
        if self._id is None:
            return
        try:
            if self._decided and self._held:
                # Whether the target runs is not known here: EOF makes the holder leave the container frozen. But a target that
                # runs, or is going to, needs the rest of its memory.
                if self._serving is not None:
                    while self._serving.running(_TELL_S):
                        pass
                self._held.end()
            else:
                self.abort()
        finally:
            self.leave()

    def follow(self, flags: list[str]) -> None:
        """Start the checkpoint so early that the memory can be sent while the container runs."""
        self._look_for_pid()
        ours, theirs = os.pipe()
        try:
            enlarge(ours)
            held = self._start_hold([*self._checkpoint(), "--memory-fd", str(theirs)], flags, (theirs,))
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._memory_fd = ours
        held.event("following", _HOLD_READY_S)

    def send_memory(self, expected_bytes: int) -> dict[str, Any]:
        """Send the memory that has changed since the last time, all of it the first time."""
        held = self._hold()
        started = time.monotonic()
        held.say("pass")
        passed: dict[str, Any] = {}

        def whole(wait_s: float) -> int | None:
            if held.has_event(wait_s):
                passed.update(held.event("passed", 0))
            return passed.get("written_bytes")

        shipped = self._stream_memory(whole, expected_bytes)
        told = {k: passed[k] for k in ("pages", "processes", "left_out")}
        return {**shipped, **told, "seconds": time.monotonic() - started, "link_rate": self._data().link_rate}

    def throttle(self, percent: int) -> dict[str, Any]:
        """Leave the container so many percent of the CPU time that it took, until it is frozen or the move is over.

        Says to how many processors' time that is; None where it cannot be done, and why.
        """
        held = self._hold()
        self._slowed = True
        held.say(f"throttle {int(percent)}")
        told = held.event("throttled", _HOLD_READY_S)
        return {"cpus": told["cpus"], "reason": told.get("reason", "")}

    def _speed_up(self) -> None:
        """Put back what a checkpoint that was killed cannot any more. Idempotent. Raises: RuntimeFailed."""
        if self.look() != "gone":
            command.run("update", self._container)

    def _stream_memory(self, whole: Callable[[float], int | None], expected_bytes: int) -> dict[str, Any]:
        if self._memory_fd is None:
            raise ProtocolError("the memory is not followed")
        self._passes += 1
        tell = self._progress()
        images, name = str(places.images(self._migration())), f"memory-{self._passes}.img"
        shipper = self._data()
        return self._told(shipper.stream_memory(self._memory_fd, images, name, whole, lambda sent: tell(sent, expected_bytes)))

    def hold_checkpoint(self, flags: list[str], memory_bytes: int = 0) -> None:
        """Start the checkpoint: CRIU is ready, and the container untouched."""
        Flushing(self._shared).wait()  # so that little is left to flush in the freeze
        if self._memory_fd is not None:
            self._hold().say("prepare")
            self._hold().event("ready", _HOLD_READY_S)
            return
        self._look_for_pid()
        self._start_hold(self._checkpoint(), flags).event("ready", _HOLD_READY_S)
        warm(memory_bytes)  # for the images

    def _look_for_pid(self) -> None:
        state = command.state(self._container)
        if state is None:
            raise RuntimeFailed(f"container does not exist: {self._container}")
        self._pid = state["pid"]

    def _checkpoint(self) -> list[str]:
        migration = self._migration()
        images, decision = str(places.images(migration)), str(places.decision(migration))
        return ["checkpoint", "--image-path", images, "--decision", decision]

    def freeze(self, later: bool = False) -> dict[str, Any]:
        """Freeze the container and dump it; what changed in its files, and its memory, go to the target meanwhile.

        With `later` what changed in its memory goes by `serve`.
        """
        started = time.monotonic()
        held = self._hold()
        if later:
            held.say("later")
        held.say("go")
        held.event("frozen", _FROZEN_S)
        self._keep_frames()
        frozen = time.monotonic()
        self._data().hurry()
        if not self._trees:
            raise ProtocolError("ship_bundle was not called")
        flushing = Flushing(self._shared)
        delta = self._send_trees(*self._written())
        shipped = time.monotonic()
        deadline = shipped + _DUMP_S

        def ended(wait_s: float) -> bool:
            return held.has_event(wait_s) or time.monotonic() > deadline

        pages = self._send_pages(held, ended) if self._memory_fd is None else self._send_last_pass(held, ended)
        flushing.wait()
        return {
            "delta": delta,
            "pages": pages,
            "freeze_ms": (frozen - started) * 1000,
            "delta_ms": (shipped - frozen) * 1000,
            "dump_ms": (time.monotonic() - frozen) * 1000,
            "spans": [
                ["freeze", 0, frozen - started],
                ["what changed in its files", frozen - started, shipped - frozen],
                ["dump; the memory goes", frozen - started, time.monotonic() - frozen],
            ],
        }

    def _send_pages(self, held: Held, ended: Callable[[float], bool]) -> dict[str, Any]:
        images = places.images(self._migration())
        pages = self._data().stream_pages(images, str(images), ended)
        held.event("held", 0)
        return self._told(pages)

    def _send_last_pass(self, held: Held, ended: Callable[[float], bool]) -> dict[str, Any]:
        memory: dict[str, Any] = {}

        def whole(wait_s: float) -> int | None:
            if not memory and ended(wait_s):
                memory.update(held.event("held", 0)["memory"])
            return memory.get("written_bytes")

        shipped = self._stream_memory(whole, 0)
        self._later_bytes = int(memory["later_pages"] * _PAGE_BYTES * _WITH_HEADS)
        return {**shipped, **{k: memory[k] for k in ("pages", "late_pages", "later_pages")}}

    def serve(self) -> None:
        """Begin to send the memory that was left for later, and what of it is asked for first, until `served`, or an abort."""
        held, shipper, fd = self._hold(), self._data(), self._memory_fd
        if fd is None:
            raise ProtocolError("the memory is not followed")
        held.say("serve")
        self._serving = Serving(shipper, fd, str(places.images(self._migration())), held, self._later_bytes)
        self._serving.require_good()

    def served(self) -> dict[str, Any]:
        """Wait until all of it is there. Raises: MigrateError when it never will be."""
        if self._serving is None:
            raise ProtocolError("no memory was to be sent later")
        while self._serving.running(_TELL_S):
            with contextlib.suppress(ConnectionLost):  # it has to go on all the same
                self._on_event("progress", sent_bytes=self._serving.sent_bytes, total_bytes=0)
        return self._serving.result()

    def ship_images(self) -> dict[str, Any]:
        """Send the rest of the checkpoint: all but its memory."""
        images = places.images(self._migration())
        return self._told(self._data().send_tree(Tree(images, watched=False), str(images), self._progress(), patches=False))

    def decide(self) -> dict[str, Any]:
        """Write the decision to commit; it is on disk when this returns. Raises: OSError; whether it is, is then not known.

        Returns what `frames` does.
        """
        migration = self._migration()
        if self._serving is not None:
            self._serving.require_good()
        self._decided = True
        durable.write(places.decision(migration), durable.COMMIT)
        self._silence()
        return self.frames(AT_ONCE_BYTES)

    def revoke(self) -> None:
        """Take the decision back: it is certain that the target does not run. Idempotent."""
        durable.write(places.decision(self._migration()), durable.REVOKED)
        self._decided = False

    def kill(self) -> None:
        """Let CRIU kill the dumped container. Raises: ProtocolError while its memory is not all on the target."""
        if self._serving is not None and not self._serving.is_through:
            raise ProtocolError("the target has not all of its memory")
        self._hold().say("commit")

    def abort(self) -> None:
        """Let go of what is held: the container runs on. Idempotent. Raises: RuntimeFailed."""
        if self._serving is not None:
            self._serving.stop()
        self._close_memory()  # who writes there would wait for ever
        if self._held is not None:
            self._held.say("abort")
            ended = self._held.end()
            self._held = None
            if not ended and self.look() == "frozen":
                # It had to be killed before it could thaw what it had frozen.
                command.run("resume", self._container)
        if self._slowed:
            self._speed_up()
            self._slowed = False

    def take_over(self, migration_id: str, coordinator: str, wait_s: float) -> dict[str, Any]:
        """Take on a move that was left behind, when all that it had here has ended.

        Raises: UnknownMigration; Locked when it is under way still.
        """
        record = records.find(migration_id)
        directory = places.history(migration_id)
        if record.role != "source":
            raise MigrateError(f"{record.source} is the source of {migration_id}, not this host")
        plan = records.plan(directory)
        self._take(migration_id, str(plan["container"]), coordinator, min(float(wait_s), 900.0))
        self._bundle, self._created = str(plan["bundle"]), str(plan.get("created", ""))
        self._volumes = tuple(map(str, plan.get("volumes") or ()))
        self._inodes = {str(path): int(inode) for path, inode in (plan.get("inodes") or {}).items()}
        self._overlay = source_layers.noted(plan)
        self._adopt_network(plan)
        try:
            left = records.left(directory)
            self._decided = left.decision != Decision.NONE
            self._journal = Journal(directory)
        except OSError as e:
            self._leave()
            raise MigrateError(f"cannot read the decision in {directory}: {e.strerror}") from e
        except BaseException:
            self._leave()
            raise
        # It does not stand in the way of all else: the next `runtime update` puts it back, too.
        with contextlib.suppress(RuntimeFailed):
            self._speed_up()
        state = self.look()
        if left.decision == Decision.COMMIT and state == "frozen":
            self._silence()  # whoever decided may have been killed before it had done so
        return {
            "decision": left.decision,
            "state": state,
            "plan": plan,
            "was_released": left.was_released,
            "ran_on": left.ran_on,
        }

    def look(self) -> str:
        """Return what of the container is here: running, frozen or gone. Another one of that name does not count."""
        self._migration()
        state = command.state(self._container)
        if state is None or state["status"] == "stopped" or (self._created and state.get("created") != self._created):
            return "gone"
        return "frozen" if state["status"] == "paused" else "running"

    def look_here(self) -> dict[str, Any]:
        """Return what `look` does, as an answer."""
        return {"state": self.look()}

    def thaw(self) -> None:
        """Let the container run on. Idempotent. Raises: RuntimeFailed, NetworkFailed."""
        if self._decided:
            raise ProtocolError("the decision was not taken back")
        if self.look() == "frozen":
            command.run("resume", self._container)
        self._join_network()

    def freeze_now(self) -> None:
        """Stop the container where it is: a second copy runs. Idempotent. Raises: RuntimeFailed."""
        if self.look() == "running":
            command.run("pause", self._container)

    def forget(self, keep_bundle: bool) -> None:
        """Delete the container, which runs elsewhere, its network, its bundle and the volumes that moved along. Idempotent.

        Raises: MigrateError, OSError with the first thing that could not be removed, when the rest is.
        """
        if not self._decided:
            raise ProtocolError("it was not decided that the container runs elsewhere")
        state = command.state(self._container)
        if state is not None:
            if self._created and state.get("created") != self._created:
                return  # another one has taken its name, and maybe its bundle
            command.run("delete", "--force", self._container)
        errors: list[Exception] = []
        removals: list[Callable[[], None]] = [self._remove_network]
        if not keep_bundle:
            removals += self._removals()
        for remove in removals:
            try:
                remove()
            except (MigrateError, OSError) as e:
                errors.append(e)
        if errors:
            raise errors[0]
