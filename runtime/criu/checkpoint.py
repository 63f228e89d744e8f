"""`runtime checkpoint`: dump a container that we froze ourselves, held or not.

The cgroup is frozen by us before CRIU looks at it, and CRIU is told so (freeze_cgroup), which saves CRIU's own wait. CRIU thaws
it while it works and stops the processes itself; at `post-dump` we freeze it again. That is the belt of the hold: whatever
happens to this process or to CRIU, the container does not run again before somebody thaws it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from runtime.cgroups.throttle import Throttle
from runtime.container.container import Container
from runtime.container.lifecycle import require
from runtime.criu import advice, compare, configfiles, features, images, pagemap, request, scan, survey, sweep
from runtime.criu.findings import REMEDY, Finding, Severity, at_once, examine, fail
from runtime.criu.follow import Follow
from runtime.criu.hold import Controller, Decision
from runtime.criu.options import CheckpointOptions, NetworkLock
from runtime.criu.request import ContainerFacts
from runtime.criu.session import Session
from runtime.errors import ContainerError, CriuError, HoldAborted, KernelError, UsageError
from runtime.files import write_all
from runtime.linux import process
from runtime.linux.procfs import has_pending
from runtime.memory import later

_FILLED_S = 45.0


def check(container: Container, options: CheckpointOptions) -> list[Finding]:
    """Say what would stand in the way of a checkpoint; nothing is frozen, nothing is written. Raises: ContainerError."""
    require("checkpoint", container.id, container.status())
    try:
        return examine(survey.look(container, options), options)
    except (FileNotFoundError, ProcessLookupError, StopIteration) as e:
        raise ContainerError(f"container {container.id} ended while it was looked at") from e


def checkpoint(
    container: Container,
    options: CheckpointOptions,
    controller: Controller | None = None,
    at_rest: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Dump a running container; return CRIU's statistics.

    With a controller, the dump is held until it decides; without one, a container that does not run on is deleted.
    `at_rest` is called when the images are written and the processes stand still; when it raises, they run on.

    Raises: ContainerError; the container then runs on. HoldAborted when the controller said so.
    """
    _wait_filled(container)
    if options.memory_fd is None or controller is None:
        return _checkpoint(container, options, controller, at_rest, None)
    with contextlib.closing(Follow(options.memory_fd, container.manager().pids)) as follow:
        require("checkpoint", container.id, container.status())
        controller.say("following")
        throttle = Throttle(container.manager(), container.throttle_note())
        try:
            # Others may use the container meanwhile: it is not locked yet, and CRIU has not looked at it.
            if not controller.wait_go("prepare", before=_words(container, controller, follow, throttle)):
                raise HoldAborted(f"checkpoint of {container.id} was aborted before it began")
            return _checkpoint(container, options, controller, at_rest, follow, throttle)
        finally:
            # Of a container that was deleted nothing is left to put back.
            with contextlib.suppress(ContainerError):
                throttle.lift()


def _words(container: Container, controller: Controller, follow: Follow, throttle: Throttle) -> dict[str, Callable[[str], None]]:
    return {
        "pass": lambda _: _one_pass(container, controller, follow),
        "throttle": lambda percent: _slow(controller, throttle, percent),
        "later": lambda _: follow.leave_for_later(),
    }


def _one_pass(container: Container, controller: Controller, follow: Follow) -> None:
    # A process that stands still takes no call for us.
    require("checkpoint", container.id, container.status())
    controller.say("passed", **follow.one_pass())


def _slow(controller: Controller, throttle: Throttle, percent: str) -> None:
    if not percent.isdecimal() or not 1 <= int(percent) <= 100:
        raise ContainerError(f"throttle takes a percentage from 1 to 100, not {percent!r}")
    try:
        controller.say("throttled", cpus=throttle.to(int(percent)))
    except ContainerError as e:
        controller.say("throttled", cpus=None, reason=e.message)


def _checkpoint(
    container: Container,
    options: CheckpointOptions,
    controller: Controller | None,
    at_rest: Callable[[], None] | None,
    follow: Follow | None,
    throttle: Throttle | None = None,
) -> dict[str, Any]:
    images.make(options.image_path)
    images.make(options.work_path)
    if options.parent_path is not None:
        images.require_parent(options.parent_path)
        pagemap.require_whole(options.parent_path)
        if options.image_path.resolve() in (d.resolve() for d in images.chain(options.parent_path)):
            raise UsageError(f"--image-path {options.image_path} is one of the dumps that this one builds upon")
    with container.store.locked(container.id):
        container.refresh()
        require("checkpoint", container.id, container.status())
        with _private_files():
            tracks_memory = _tracks_memory(options)
            if options.page_server is not None and not tracks_memory and (options.pre_dump or options.parent_path is not None):
                raise UsageError(
                    "--page-server: this kernel does not track dirty pages, and memory that is elsewhere cannot be compared",
                    hint="leave --page-server out, or --pre-dump and --parent-path",
                )
            if options.pre_dump:
                return _pre_dump(container, options, tracks_memory)
            _refuse_at_once(container)
            facts, names = survey.facts(container, options, rebuild_network=controller is not None)
            if not facts.only_loopback and not facts.has_nft and not facts.has_iptables and options.network_lock is None:
                raise ContainerError(
                    "neither nft nor iptables is here to lock the network", hint=f"{REMEDY['network-lock']} [network-lock]"
                )
            images.clear(options.image_path)
            images.save_stdio(options.image_path, names[:3])
            notes = {"network": "rebuild" if facts.rebuild_network else "restore", "descriptors": list(names)}
            if follow is not None:
                notes["memory"] = "sent"
            images.save_notes(options.image_path, notes)
            if not tracks_memory:
                facts = request.without_parent(facts)
            compares = options.parent_path is not None and not tracks_memory
            dump = _Dump(container, options, facts, controller, at_rest, compares, follow, throttle)
            with _explained(container, options):
                try:
                    _run(dump, options, facts)
                except BaseException as e:
                    dump.let_go(e)
                    raise
                dump.let_go(None)
            found = images.stats(options.work_path, "dump") or images.stats(options.image_path, "dump") or dump.stats
        if not options.leave_running:
            _wait_dead(container)
            if controller is None:
                container.remove()
    return found


def _run(dump: _Dump, options: CheckpointOptions, facts: ContainerFacts) -> None:
    if dump.follow is not None:
        unasked, theirs = socket.socketpair()
        with unasked, theirs, Session(process.die_with_parent, (theirs.fileno(),)) as session:
            dump.session = session
            fields = request.dump(options, facts, theirs.fileno())
            with contextlib.suppress(_Through):
                session.run("DUMP", fields, options.image_path, options.work_path, request.DUMP_LOG, dump.on_notify)
        return
    # A CRIU that serves memory would not notice that nobody waits for it any more.
    with Session(process.die_with_parent if options.lazy_pages else None) as session:
        fields = request.dump(configfiles.with_address(options), facts)
        places = options.image_path, options.work_path, request.DUMP_LOG
        session.run("DUMP", fields, *places, dump.on_notify, dump.while_serving if options.lazy_pages else None)
        dump.answered()
    dump.complete()


def _wait_filled(container: Container) -> None:
    """Wait until the memory of an earlier lazy restore is there: what is missing still would be missing in the images.

    Raises: ContainerError when it takes too long.
    """
    deadline = time.monotonic() + _FILLED_S
    while any(scan.is_being_filled(pid) for pid in container.manager().pids()):
        if time.monotonic() > deadline:
            raise ContainerError(
                f"the memory of container {container.id} is still being filled in after its restore", hint="try again when it is"
            )
        time.sleep(0.05)


class _Through(Exception):
    """CRIU was ended by us, since nothing is left for it to do."""


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """Make files, CRIU's too, that are their owner's alone: images hold secrets, and their directory may be open to others."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)  # hooks are not to know of it


def _refuse_at_once(container: Container) -> None:
    """Refuse what CRIU would not notice, or only after a long time. Raises: ContainerError."""
    members = scan.family(container.state.pid, container.manager().pids())
    if found := at_once(tuple(scan.tasks(members))):
        raise ContainerError(found.words, hint=f"{found.remedy} [{found.code}]")


@contextlib.contextmanager
def _explained(container: Container, options: CheckpointOptions) -> Iterator[None]:
    """Explain a failure of CRIU's by what `check` finds, where that says more than CRIU's log."""
    try:
        yield
    except CriuError as e:
        try:
            found = [f for f in examine(survey.look(container, options), options) if f.severity == Severity.FAIL]
        except (ContainerError, OSError, StopIteration):
            raise e from None
        told = advice.code(e.log_lines)
        # Without a pid namespace of its own it can be dumped: that is the restore's trouble.
        likely = [f for f in found if f.code == told or (told is None and f.code != "pid-namespace")]
        f = likely[0] if likely else None
        if f is None and told is None and options.page_server is not None:
            host, port = options.page_server
            f = fail("page-server", f"is a page server listening at {host}:{port}")
        if f is None:
            raise
        raise CriuError(e.message, log_lines=e.log_lines, hint=f"{f.words}: {f.remedy} [{f.code}]") from e


def _tracks_memory(options: CheckpointOptions) -> bool:
    """Say whether the kernel can tell what was written to since the parent; without a parent, whether it will from now on."""
    if options.parent_path is None:
        return options.pre_dump and features.tracks_memory()
    return images.tracked(options.parent_path) and features.tracks_memory()


def _pre_dump(container: Container, options: CheckpointOptions, tracks_memory: bool) -> dict[str, Any]:
    """Write the memory, or what of it differs from the parent's, while the container runs."""
    facts, _ = survey.facts(container, options, rebuild_network=False)
    images.clear(options.image_path)
    if not tracks_memory:
        return compare.pre_dump(container.manager().pids(), options.image_path, options.parent_path)
    with Session() as session:
        session.run(
            "SINGLE_PRE_DUMP",
            request.pre_dump(options, facts),
            options.image_path,
            options.work_path,
            request.DUMP_LOG,
            lambda script, pid, fd: True,
        )
    return images.stats(options.work_path, "dump") or images.stats(options.image_path, "dump")


class _Dump:
    """Answers CRIU's notifies, and remembers whether the container is to be thawed at the end."""

    def __init__(
        self,
        container: Container,
        options: CheckpointOptions,
        facts: ContainerFacts,
        controller: Controller | None,
        at_rest: Callable[[], None] | None,
        compares: bool,
        follow: Follow | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        self.follow, self._throttle = follow, throttle
        self.session: Session | None = None
        self.stats: dict[str, Any] = {}
        self._container, self._options, self._facts, self._controller = container, options, facts, controller
        self._at_rest, self._compares = at_rest, compares
        self._manager = container.manager()
        self._thaw = self._committed = self._serving = self._answered = self._begun = False
        locks = request.network_lock(options, facts) != NetworkLock.SKIP
        self._known_locks = sweep.locks(container.state.pid) if locks else frozenset()
        self._compared: dict[str, int] = {}  # statistics that CRIU, which comes later, does not know

    def on_notify(self, script: str, pid: int, fd: int | None) -> bool:
        if script == "pre-dump":
            self._freeze()
        elif script == "status-ready" and self.follow is not None:
            self._at_status_ready(self.follow)
        elif script == "status-ready":
            self._serve()
        elif script == "post-dump":
            self._at_post_dump()
        return True

    def _at_post_dump(self) -> None:
        if self._options.lazy_pages or self.follow is not None:
            return  # CRIU is not through yet: it serves the memory
        if self._at_rest is None and self._options.leave_running:
            return  # it need not stand still for what is left to do
        self._manager.freeze_soon()
        self._compare()
        if self._controller is not None:
            self._hold(self._controller)
        elif self._at_rest is not None:
            self._at_rest()
        if not self._options.leave_running:
            # With the signal pending they never run again; frozen they would not die, and CRIU would wait for them.
            self._manager.signal_all(signal.SIGKILL)
        self._manager.thaw()

    def _at_status_ready(self, follow: Follow) -> None:
        """CRIU has written its images, and waits for somebody to fetch the memory: it is ended here, whatever is decided."""
        assert self.session is not None and self._controller is not None
        try:
            self._manager.freeze_soon()
            self.stats = follow.end_last(self._options.image_path)
            self._hold(self._controller, memory=self.stats)
            self._manager.signal_all(signal.SIGKILL)
        finally:
            self.session.process.kill()
            self.session.process.wait()
        self._manager.thaw()
        raise _Through

    def answered(self) -> None:
        """CRIU is through: what lives on runs at once, before anything else is done."""
        self._answered = True
        self._serving = False
        self._release()

    def complete(self) -> None:
        """Finish the images, and the statistics that CRIU has written last."""
        self._compare()
        for place in {self._options.image_path, self._options.work_path}:
            images.update_stats(place, self._compared)

    def _compare(self) -> None:
        """Where the kernel does not track dirty pages, drop from the images what the parent has already."""
        if self._compares and self._options.parent_path is not None:
            self._compares = False
            self._compared = compare.drop_known(self._options.image_path, self._options.parent_path)

    def _freeze(self) -> None:
        if self._controller is not None:
            self._controller.say("ready")
            if not self._controller.wait_go(before=self._words()):
                raise HoldAborted(f"checkpoint of {self._container.id} was aborted before it began")
        self._thaw = self._begun = True
        self._container.being_dumped(self._known_locks)
        if self._throttle is not None:
            self._throttle.lift()  # what CRIU has the processes do for it is not to be slowed down
        self._manager.freeze()
        if self._controller is not None:
            self._controller.say("frozen")
        if self.follow is not None:
            self.follow.begin_last()

    def _words(self) -> dict[str, Callable[[str], None]]:
        """Return what else a controller may say before it says go."""
        if self.follow is None or self._throttle is None or self._controller is None:
            return {}
        return _words(self._container, self._controller, self.follow, self._throttle)

    def _serve(self) -> None:
        """CRIU waits for the other side to fetch the memory. From here on a copy may run there: this one must not."""
        self._serving = True
        self._manager.freeze_soon()
        if self._options.status_fd is not None:
            try:
                write_all(self._options.status_fd, b"\0")
                os.close(self._options.status_fd)
            except OSError as e:
                raise UsageError(f"--status-fd {self._options.status_fd} cannot be written to: {e.strerror}") from e

    def while_serving(self) -> None:
        """See CRIU kill the processes when all memory is fetched: frozen they would not die, and CRIU would wait for them."""
        if self._serving and has_pending(self._container.state.pid, signal.SIGKILL):
            self._manager.thaw()

    def _hold(self, controller: Controller, **fields: Any) -> None:
        controller.say("held", pid=self._container.state.pid, **fields)
        decision = controller.wait_decision(before={"serve": self._serve_later, **dict.fromkeys(later.WORDS, lambda _: None)})
        if decision == Decision.LEAVE_FROZEN:
            self._thaw = False
            raise HoldAborted(
                f"the controller of {self._container.id} is gone, but it had decided to commit: the container is left frozen",
                hint=f"when it does not run elsewhere: runtime resume {self._container.id}",
            )
        if decision == Decision.ABORT:
            raise HoldAborted(f"checkpoint of {self._container.id} was aborted: it runs on")
        self._committed = True

    def _serve_later(self, _: str) -> None:
        """Send the memory that was left for later. The container stands still all the while."""
        assert self._controller is not None
        if self.follow is None:
            raise ContainerError("unexpected word 'serve' on the control descriptor", hint="no memory was to be sent later")
        self.follow.serve(self._controller)

    def let_go(self, error: BaseException | None) -> None:
        """Thaw: what CRIU left alive runs on, what it killed dies for good.

        Raises: ContainerError when it must be left frozen.
        """
        if self._committed:
            # It runs elsewhere by now: also when CRIU failed to kill it, it must not run here again.
            self._manager.signal_all(signal.SIGKILL)
        if self._begun and not self._answered:
            # A CRIU that was killed leaves the container mute.
            sweep.sweep(self._container.state.pid, self._manager.pids(), self._known_locks)
        if self._serving:
            name = self._container.id
            raise ContainerError(
                f"container {name} is left frozen: its memory was being fetched, and the copy may run there: {error}",
                hint=f"when it does not: runtime resume {name}; when it does: runtime delete --force {name}",
            ) from error
        self._release()

    def _release(self) -> None:
        if self._thaw:
            self._thaw = False
            with contextlib.suppress(KernelError):
                self._manager.thaw()
            self._container.being_dumped(None)


def _wait_dead(container: Container, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while container.alive() or container.manager().pids():
        if time.monotonic() > deadline:
            raise ContainerError(f"container {container.id} was dumped, but its processes do not end")
        time.sleep(0.001)
