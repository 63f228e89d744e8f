"""One container and one method for each verb. Verbs that change it hold its lock."""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime import log
from runtime.cgroups.manager import Manager, container_paths, host_layout
from runtime.container import bundle as bundle_module
from runtime.container.bundle import Bundle
from runtime.container.lifecycle import Status, derive, require
from runtime.container.store import Store
from runtime.errors import ContainerError, NotFound, SpecError, UsageError, WrongStatus
from runtime.linux.process import pidfd_open, pidfd_send_signal
from runtime.linux.procfs import read_stat
from runtime.process import hooks
from runtime.process.handshake import connect_to_start, listen_for_start
from runtime.setup.plan import DEFAULT_DEVICE_RULES
from runtime.spec.config import Spec
from runtime.spec.state import State, oci_state, runc_state


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """What `create` and `run` are told beside the bundle."""

    no_pivot: bool = False
    no_new_keyring: bool = False
    preserve_fds: int = 0
    systemd_cgroup: bool = False


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
        return Manager(host_layout(), self.state.cgroup_paths)

    def bundle(self) -> Bundle:
        """Return the bundle as it was when the container was created. Raises: ContainerError."""
        return bundle_module.parse(Path(self.state.bundle), self.store.config_path(self.id))

    def _annotations(self) -> dict[str, str]:
        try:
            return dict(self.bundle().spec.annotations)
        except ContainerError:
            return {}

    def hook_state(self, status: str) -> dict[str, Any]:
        return oci_state(self.state, status, self._annotations())

    def adopt(self, pid: int) -> None:
        """Record the container's first process. Raises: ContainerError when it has ended already."""
        stat = read_stat(pid)
        if stat is None:
            raise ContainerError(f"process {pid} of container {self.id} ended at once")
        self.state = replace(self.state, pid=pid, start_time=stat.start_time)
        self.store.save(self.state)

    def document(self) -> dict[str, Any]:
        """Return what `state` prints."""
        return runc_state(self.state, self.status(), self._annotations())

    def start(self) -> None:
        """Let a created container run its program.

        Raises: WrongStatus; ContainerError when its program could not be executed: the container is then stopped.
        """
        with self.store.locked(self.id):
            self.refresh()
            require("start", self.id, self.status())
            channel = connect_to_start(self.store.directory(self.id))
            if channel is None:
                raise WrongStatus(f"cannot start a container that has stopped: {self.id}")
            channel.send({"go": True})
            channel.receive()  # EOF: the program runs
            channel.close()
            with contextlib.suppress(FileNotFoundError):
                (self.store.directory(self.id) / "start.sock").unlink()
            self._run_hooks("poststart", "running", fatal=True)

    def kill(self, number: int, everything: bool = False) -> None:
        """Send a signal to the first process, or to all. Raises: WrongStatus."""
        with self.store.locked(self.id):
            self.refresh()
            if everything:
                self.manager().signal_all(number)
                return
            require("kill", self.id, status := self.status())
            self._signal(number)
            if number == signal.SIGKILL and status == Status.PAUSED:
                self.manager().thaw()  # on v1 a frozen process dies only once it is thawed

    def _signal(self, number: int) -> None:
        try:
            pidfd = pidfd_open(self.state.pid)
        except ProcessLookupError:
            raise WrongStatus(f"container not running: {self.id}") from None
        try:
            if not self.alive():
                raise WrongStatus(f"container not running: {self.id}")
            pidfd_send_signal(pidfd, number)
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
            self._destroy()

    def _destroy(self) -> None:
        """Kill what is left, remove the cgroups, run poststop, remove the state. Hold the lock."""
        manager = self.manager()
        if self.alive() or manager.pids():
            manager.signal_all(signal.SIGKILL)
            with contextlib.suppress(ContainerError):
                manager.thaw()
            self._wait_gone(manager)
        manager.remove()
        self._run_hooks("poststop", "stopped", fatal=False)
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

    def _run_hooks(self, name: str, status: str, *, fatal: bool) -> None:
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


def create(
    store: Store, container_id: str, bundle: Bundle, options: CreateOptions, on_console: Callable[[int], None] | None
) -> Container:
    """Make a container whose first process waits for `start`.

    `on_console` takes the master of its terminal, and must be there when the process wants one.

    Raises: ContainerError; then nothing of the container is left.
    """
    # Only what makes processes needs these: the other verbs start faster without.
    from runtime.linux.capability import last_capability
    from runtime.process import create as create_process
    from runtime.process.identity import check_capabilities
    from runtime.process.init import InitOrders
    from runtime.setup.plan import plan

    spec = bundle.spec
    if spec.process is None:
        raise SpecError(f"{bundle.path}/config.json: /process: is required to create a container")
    process = spec.process
    if process.terminal and on_console is None:
        raise UsageError(
            "cannot allocate a terminal: nobody would hold its other end",
            hint="with --detach give --console-socket, or set /process/terminal to false in config.json",
        )
    check_capabilities(process)
    setup = plan(spec, str(bundle.path))
    layout = host_layout()
    manager = Manager(layout, container_paths(layout, cgroups_path(spec, options.systemd_cgroup), container_id))
    joins = create_process.open_namespaces(spec.linux.namespaces)
    directory = store.make(container_id)
    with store.locked(container_id):
        container = Container(store, container_id)
        made_cgroups = False
        try:
            state = State(
                id=container_id,
                bundle=str(bundle.path),
                rootfs=str(bundle.rootfs),
                created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                owner=owner(),
                cgroup_paths=manager.paths,
                stdio=describe_stdio(process.terminal),
            )
            store.save(state)
            container.state = state
            store.save_config(container_id, bundle.document)
            if manager.pids():
                raise ContainerError(
                    f"cgroup of container {container_id} holds processes already: {manager.pids()}",
                    hint="choose another /linux/cgroupsPath, or end them",
                )
            made_cgroups = True
            manager.create()
            manager.set(spec.linux.resources, DEFAULT_DEVICE_RULES)
            listener = listen_for_start(directory)
            cgroup_namespace = spec.linux.namespace("cgroup")
            orders = InitOrders(
                spec=spec,
                process=process,
                plan=setup,
                rootfs=str(bundle.rootfs),
                bundle=str(bundle.path),
                container_id=container_id,
                layout=layout,
                cgroup_paths=manager.paths,
                join=joins,
                new_cgroup_namespace=cgroup_namespace is not None and not cgroup_namespace.path,
                no_pivot=options.no_pivot,
                new_keyring=not options.no_new_keyring,
                preserve_fds=options.preserve_fds,
                last_capability=last_capability(),
                hook_state=oci_state(state, "creating", dict(spec.annotations)),
            )

            def on_pid(pid: int) -> None:
                container.adopt(pid)
                manager.apply(pid)

            def on_hooks() -> None:
                for name in ("prestart", "createRuntime"):
                    hooks.run_hooks(spec.hooks.get(name, ()), name, container.hook_state("creating"))

            create_process.spawn(orders, listener, on_pid, on_hooks, on_console or os.close)
            listener.close()
        except BaseException:
            with contextlib.suppress(ContainerError, OSError):
                if made_cgroups:
                    manager.remove()
            container._run_hooks("poststop", "stopped", fatal=False)
            store.remove(container_id)
            raise
    return container


def cgroups_path(spec: Spec, systemd: bool) -> str | None:
    """Return the path of the container's cgroups.

    With --systemd-cgroup it is written SLICE:PREFIX:NAME. There is no systemd driver here: the cgroup gets the place
    that systemd would give it, and a warning says that systemd does not know of it.
    """
    path = spec.linux.cgroups_path
    if systemd:
        log.warning("--systemd-cgroup: cgroups are made without systemd")
        if path and path.count(":") == 2:
            slice_, prefix, name = path.split(":")
            return f"/{slice_ or 'system.slice'}/{prefix + '-' if prefix else ''}{name}.scope"
    return path


def describe_stdio(terminal: bool) -> tuple[str, str, str]:
    """Say what fds 0-2 are, for a restore that must give the container others in their place."""
    if terminal:
        return ("", "", "")
    names = []
    for fd in range(3):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError as e:
            if e.errno != errno.ENOENT:
                raise
            names.append("")
    return (names[0], names[1], names[2])


def owner() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())
