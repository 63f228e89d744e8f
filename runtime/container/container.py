"""One container and one method for each verb. Verbs that change it hold its lock."""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from runtime import OCI_VERSION, log
from runtime.cgroups import systemd, throttle
from runtime.cgroups.manager import Manager, host_layout
from runtime.container import bundle as bundle_module
from runtime.container.activation import NotifySocket
from runtime.container.bundle import Bundle
from runtime.container.lifecycle import Status, derive, require
from runtime.container.store import Store
from runtime.errors import ContainerError, KernelError, NotFound, WrongStatus
from runtime.linux.process import pidfd_open, pidfd_send_signal
from runtime.linux.procfs import read_stat
from runtime.process import hooks
from runtime.process.handshake import connect_to_start
from runtime.setup.plan import DEFAULT_DEVICE_RULES
from runtime.spec.parse import parse_resources
from runtime.spec.resources import Resources
from runtime.spec.state import State, oci_state, runc_state
from runtime.values import replace


class Container:
    """A container of a store, found by its id. Raises: NotFound when made for an id that is not there."""

    def __init__(self, store: Store, container_id: str) -> None:
        self.store, self.id = store, container_id
        try:
            self.state = store.load(container_id)
        except NotFound:
            if not (store.directory(container_id)).is_dir():
                raise
            # A verb died between making the directory and writing the first state.
            self.state = State(container_id, "", "", "", "")

    def status(self) -> Status:
        """Look at the container and tell its status."""
        alive = self.alive()
        waits = False
        if alive and (channel := connect_to_start(self.store.directory(self.id))):
            channel.close()
            waits = True
        return derive(
            pid=self.state.pid,
            alive=alive,
            waits_for_start=waits,
            frozen=alive and self.manager().told_to_freeze(),
            being_created=not self.state.pid,
        )

    def alive(self) -> bool:
        """Say whether the first process lives, and is no later one of its number."""
        stat = read_stat(self.state.pid) if self.state.pid else None
        return stat is not None and stat.state not in "ZX" and stat.start_time == self.state.start_time

    def manager(self) -> Manager:
        return Manager(host_layout(), dict(self.state.cgroup_paths))

    def bundle(self) -> Bundle:
        """Return the bundle as it was when the container was created. Raises: ContainerError."""
        return bundle_module.parse(Path(self.state.bundle), self.store.config_path(self.id))

    def annotations(self) -> dict[str, str]:
        """Return the document's annotations; reading no more of it keeps `state` fast."""
        try:
            annotations = json.loads(self.store.config_path(self.id).read_bytes()).get("annotations")
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}
        return annotations if isinstance(annotations, dict) else {}

    def hook_state(self, status: str) -> dict[str, Any]:
        return oci_state(self.state, status, self.annotations())

    def make_cgroups(self, manager: Manager, resources: Resources, where_allowed: bool) -> None:
        """Make and limit the container's cgroups; record what was made. Raises: ContainerError."""
        if where_allowed:
            manager.create_where_allowed()
            self.state = replace(self.state, cgroup_paths=manager.paths)
        else:
            self.state = replace(self.state, cgroup_parents=tuple(manager.create()))
        self.store.save(self.state)
        # Nobody but the host's root can make nodes that rules would have to close.
        manager.set(resources, () if where_allowed else DEFAULT_DEVICE_RULES)

    def _scope(self) -> systemd.Scope | None:
        return systemd.Scope(*self.state.systemd_unit) if self.state.systemd_unit else None

    def record_failure(self, reason: str) -> None:
        """Leave word of why a container ended that nobody waited for; `state` shows it."""
        with contextlib.suppress(OSError):
            (self.store.directory(self.id) / "failure").write_text(reason)

    def being_dumped(self, locks: frozenset[str] | None) -> None:
        """Leave word that CRIU is at work on it, and which locks are not CRIU's of this time; None takes the word back.

        Whoever finds it too late must clean up.
        """
        mark = self.store.directory(self.id) / "dump"
        with contextlib.suppress(OSError):
            if locks is None:
                mark.unlink()
            else:
                mark.write_text(json.dumps(sorted(locks)))

    def was_being_dumped(self) -> frozenset[str] | None:
        """Return the locks that `being_dumped` named, None when nobody left word."""
        try:
            return frozenset(json.loads((self.store.directory(self.id) / "dump").read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            return frozenset()

    def throttle_note(self) -> Path:
        """Return where it is noted that the container was slowed down for a while: see runtime/cgroups/throttle.py."""
        return self.store.directory(self.id) / "throttle"

    def run_setup_hooks(self, pid: int) -> None:
        """Run the hooks that set the namespaces up from outside, for a first process that is not the container's yet.

        Raises: HookFailed.
        """
        found = self.bundle().spec.hooks
        for name in ("prestart", "createRuntime"):
            hooks.run_hooks(found.get(name, ()), name, oci_state(replace(self.state, pid=pid), "creating", self.annotations()))

    def adopt(self, pid: int) -> None:
        """Record the container's first process. Raises: ContainerError when it has ended already."""
        stat = read_stat(pid)
        if stat is None:
            raise ContainerError(f"process {pid} of container {self.id} ended at once")
        self.state = replace(self.state, pid=pid, start_time=stat.start_time)
        self.store.save(self.state)

    def document(self) -> dict[str, Any]:
        """Return what `state` prints."""
        annotations = self.annotations()
        with contextlib.suppress(OSError):
            annotations = {**annotations, "ferry.failure": (self.store.directory(self.id) / "failure").read_text()}
        return runc_state(self.state, self.status(), annotations)

    def start(self) -> None:
        """Let a created container run its program; where systemd waits for its readiness, wait for that, too.

        Raises: WrongStatus; ContainerError when its program could not be executed: the container is then stopped.
        """
        notify = NotifySocket.of_caller(self.store.directory(self.id))
        listener = None
        with self.store.locked(self.id):
            self.refresh()
            require("start", self.id, self.status())
            channel = connect_to_start(self.store.directory(self.id))
            if channel is None:
                raise WrongStatus(f"cannot start a container that has stopped: {self.id}")
            if notify is not None and (self.store.directory(self.id) / "notify").is_dir():
                listener = notify.listen()
            channel.send({"go": True})
        # From here on without the lock: hooks may take their time, and may call verbs on this container.
        while (answer := channel.receive()) != (None, None):  # EOF: the program runs
            if answer[0] and "seccomp" in answer[0] and answer[1] is not None:
                self.send_listener(self.state.pid, answer[1], "creating")
        channel.close()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (self.store.directory(self.id) / "start.sock").unlink()
        self.run_hooks("poststart", "running", fatal=True)
        if notify is not None and listener is not None:
            notify.relay(listener, self.state.pid)

    def send_listener(self, pid: int, listener: int, status: str) -> None:
        """Give the listener of a seccomp filter to the agent that the document names.

        Raises: ContainerError.
        Source: OCI runtime specification 1.2, config-linux.md, The Container Process State.
        """
        filter_spec = self.bundle().spec.linux.seccomp
        assert filter_spec is not None and filter_spec.listener_path is not None
        document = {
            "ociVersion": OCI_VERSION,
            "fds": ["seccompFd"],
            "pid": pid,
            "metadata": filter_spec.listener_metadata,
            "state": self.hook_state(status),
        }
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
                s.connect(filter_spec.listener_path)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))]
                s.sendmsg([json.dumps(document).encode()], rights)
        except OSError as e:
            path = filter_spec.listener_path
            raise KernelError(f"/linux/seccomp/listenerPath: cannot send the listener to {path}", e.errno or 0) from e
        finally:
            os.close(listener)

    def kill(self, number: int, everything: bool = False) -> None:
        """Send a signal to the first process, or to all. Raises: WrongStatus."""
        with self.store.locked(self.id):
            self.refresh()
            if everything:
                self.manager().signal_all(number)
                if self.state.cgroup_paths:
                    return
            require("kill", self.id, status := self.status())
            self._signal(number)
            if number == signal.SIGKILL and status == Status.PAUSED:
                self.manager().thaw()  # on v1 a frozen process dies only once it is thawed

    def _signal(self, number: int) -> None:
        try:
            if not self.state.pid:  # a verb died before there was one
                raise ProcessLookupError
            pidfd = pidfd_open(self.state.pid)
        except ProcessLookupError:
            raise WrongStatus(f"container not running: {self.id}") from None
        try:
            if not self.alive():
                raise WrongStatus(f"container not running: {self.id}")
            pidfd_send_signal(pidfd, number)
        except ProcessLookupError:  # it ended meanwhile
            raise WrongStatus(f"container not running: {self.id}") from None
        finally:
            os.close(pidfd)

    def pause(self) -> None:
        """Freeze all processes. Raises: WrongStatus, ContainerError."""
        with self.store.locked(self.id):
            self.refresh()
            require("pause", self.id, self.status())
            self.manager().freeze()

    def resume(self) -> None:
        """Thaw all processes. Raises: WrongStatus, ContainerError."""
        with self.store.locked(self.id):
            self.refresh()
            require("resume", self.id, self.status())
            self.manager().thaw()

    def update(self, changes: dict[str, Any]) -> None:
        """Change resources: `changes` is a resources document of what is to be different.

        Raises: SpecError with all that is wrong, before anything is changed; ContainerError naming the JSON pointer.
        """
        with self.store.locked(self.id):
            self.refresh()
            require("update", self.id, self.status())
            document = self.bundle().document
            kept = document.setdefault("linux", {}).setdefault("resources", {})
            wanted = parse_resources(changes)
            merged = {**kept}
            for group, value in changes.items():
                merged[group] = {**kept.get(group, {}), **value} if isinstance(value, dict) else value
            whole = parse_resources(merged)
            if whole.memory.swap is not None and wanted.memory.limit is not None:
                # On v2 the two depend on each other: what is written of one needs the other.
                wanted = replace(wanted, memory=replace(wanted.memory, swap=whole.memory.swap))
            if wanted.memory.swap is not None and whole.memory.limit is not None:
                wanted = replace(wanted, memory=replace(wanted.memory, limit=whole.memory.limit))
            if wanted.cpu.quota_us is not None or wanted.cpu.period_us is not None:
                both = replace(wanted.cpu, quota_us=whole.cpu.quota_us, period_us=whole.cpu.period_us)
                wanted = replace(wanted, cpu=both)
            if wanted.devices:
                wanted = replace(wanted, devices=whole.devices)
            manager = self.manager()
            throttle.heal(manager, self.throttle_note())
            limit = wanted.memory.limit
            if whole.memory.check_before_update and limit is not None and 0 <= limit < manager.memory_usage():
                raise ContainerError(f"/memory/limit: {limit} is less than the container uses: {manager.memory_usage()}")
            manager.update(wanted, DEFAULT_DEVICE_RULES)
            if (scope := self._scope()) is not None:
                scope.update(systemd.properties(wanted, unified=manager.layout.mode == "v2"))
            document["linux"]["resources"] = merged
            self.store.save_config(self.id, document)

    def pids(self) -> list[int]:
        """Return the container's processes. Raises: WrongStatus."""
        require("ps", self.id, self.status())
        return self.manager().pids()

    def delete(self, force: bool = False) -> None:
        """Remove all that is left of a stopped container; with `force` a running one is killed first.

        Raises: WrongStatus, KernelError.
        Effects: idempotent after a crash in its middle.
        """
        with self.store.locked(self.id):
            self.refresh()
            require("delete --force" if force else "delete", self.id, self.status())
            self.remove()

    def remove(self) -> None:
        """Kill what is left, remove the cgroups, run poststop, remove the state. Hold the lock."""
        manager = self.manager()
        if self.alive() or manager.pids():
            manager.signal_all(signal.SIGKILL)
            with contextlib.suppress(WrongStatus):  # where it has no cgroups, as an ordinary user's
                self._signal(signal.SIGKILL)
            with contextlib.suppress(ContainerError):
                manager.thaw()
            self._wait_gone(manager)
        if (scope := self._scope()) is not None:
            scope.stop()
        manager.remove(self.state.cgroup_parents)
        self.run_hooks("poststop", "stopped", fatal=False)
        self.store.remove(self.id)

    def _wait_gone(self, manager: Manager, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.alive() or manager.pids():
            if time.monotonic() > deadline:
                raise ContainerError(
                    f"processes of container {self.id} do not end: {manager.pids() or [self.state.pid]}",
                    hint="they are in the kernel (state D); delete again later",
                )
            time.sleep(0.002)

    def run_hooks(self, name: str, status: str, *, fatal: bool) -> None:
        try:
            spec = self.bundle().spec
        except ContainerError:
            return
        try:
            hooks.run_hooks(spec.hooks.get(name, ()), name, self.hook_state(status))
        except ContainerError as e:
            if fatal:
                raise
            log.warning(str(e))

    def refresh(self) -> None:
        """Read the state again: a verb that waited for the lock must not act on what it saw before."""
        with contextlib.suppress(NotFound):
            self.state = self.store.load(self.id)
