"""Make a container: everything between reading the bundle and a first process that waits for `start`."""

from __future__ import annotations

import contextlib
import getpass
import os
import time
from collections.abc import Callable

from runtime import log
from runtime.cgroups import systemd
from runtime.cgroups.manager import Manager, container_paths, host_layout
from runtime.container.activation import NotifySocket, listen_fds, with_listen_fds
from runtime.container.bundle import Bundle
from runtime.container.container import Container
from runtime.container.stdio import describe_stdio, give_stdio
from runtime.container.store import Store
from runtime.errors import ContainerError, SpecError, Unsupported, UsageError
from runtime.linux.capability import last_capability
from runtime.linux.const import NAMESPACES
from runtime.linux.procfs import read_cgroup
from runtime.process import create as create_process
from runtime.process import hooks
from runtime.process.confine import prepare
from runtime.process.handshake import listen_for_start
from runtime.process.identity import grantable
from runtime.process.init import InitOrders
from runtime.setup.plan import plan
from runtime.spec import validate
from runtime.spec.config import Process, Spec
from runtime.spec.state import State, oci_state
from runtime.values import Value, replace


class CreateOptions(Value):
    """What `create` and `run` are told beside the bundle."""

    no_pivot: bool = False
    no_new_keyring: bool = False
    preserve_fds: int = 0
    systemd_cgroup: bool = False
    rootless: bool = False


def create(
    store: Store, container_id: str, bundle: Bundle, options: CreateOptions, on_console: Callable[[int], None] | None
) -> Container:
    """Make a container whose first process waits for `start`.

    `on_console` takes the master of its terminal, and must be there when the process wants one.

    Raises: ContainerError; then nothing of the container is left.
    """
    spec = bundle.spec
    if spec.process is None:
        raise SpecError(f"{bundle.path}/config.json: /process: is required to create a container")
    if spec.process.terminal and on_console is None:
        raise UsageError(
            "cannot allocate a terminal: nobody would hold its other end",
            hint="with --detach give --console-socket, or set /process/terminal to false in config.json",
        )
    notify = NotifySocket.of_caller(store.directory(container_id))
    if notify is not None:
        spec = notify.inside(spec)
    sockets = listen_fds()
    assert spec.process is not None
    process = with_listen_fds(spec.process, sockets)
    process = without_what_cannot_be_given(process, spec)
    check_sysctls(spec)
    confinement = prepare(process, spec.linux)
    setup = plan(spec, str(bundle.path), detach=spec.linux.makes("user") and os.geteuid() == 0)
    layout = host_layout()
    scope = systemd_scope(spec, container_id) if options.systemd_cgroup else None
    manager = Manager(layout, container_paths(layout, cgroups_path(spec, scope), container_id))
    joins = create_process.open_namespaces(spec.linux.namespaces)
    with store.made(container_id) as directory:
        container = Container(store, container_id)
        made_cgroups = False
        try:
            state = State(
                id=container_id,
                bundle=str(bundle.path),
                rootfs=str(bundle.rootfs),
                created=timestamp(),
                owner=owner(),
                cgroup_paths=manager.paths,
                stdio=describe_stdio(process.terminal),
                new_keyring=not options.no_new_keyring,
                systemd_unit=(scope.slice, scope.unit) if scope else None,
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
            if scope is None:
                container.make_cgroups(manager, spec.linux.resources, options.rootless and spec.linux.cgroups_path is None)
            if notify is not None:
                notify.make()
            listener = listen_for_start(directory)
            orders = InitOrders(
                spec=spec,
                process=process,
                plan=setup,
                rootfs=str(bundle.rootfs),
                container_id=container_id,
                layout=layout,
                cgroup_paths=manager.paths,
                no_pivot=options.no_pivot,
                new_keyring=not options.no_new_keyring,
                preserve_fds=options.preserve_fds + sockets,
                last_capability=last_capability(),
                confinement=confinement,
                hook_state=oci_state(state, "creating", dict(spec.annotations)),
            )

            def on_pid(pid: int) -> None:
                container.adopt(pid)
                if scope is not None:
                    scope.start(pid, container_id, systemd.properties(spec.linux.resources, unified=layout.mode == "v2"))
                    if os.geteuid() != 0 and (tree := layout.of("")) is not None:
                        # Below the user's own manager, wherever that is; all that we know of is systemd's.
                        manager.paths = {"": tree.mount_point + read_cgroup(pid)[""]}
                        container.state = replace(container.state, cgroup_paths=manager.paths)
                    container.make_cgroups(manager, spec.linux.resources, options.rootless)
                manager.apply(pid)

            def on_hooks() -> None:
                for name in ("prestart", "createRuntime"):
                    hooks.run_hooks(spec.hooks.get(name, ()), name, container.hook_state("creating"))

            give_stdio(spec, process)
            create_process.spawn(orders, joins, listener, on_pid, on_hooks, on_console or os.close)
            listener.close()
        except BaseException:
            with contextlib.suppress(ContainerError, OSError):
                if made_cgroups:
                    if scope is not None:
                        scope.stop()
                    manager.remove(container.state.cgroup_parents)
            container.run_hooks("poststop", "stopped", fatal=False)
            store.remove(container_id)
            raise
    return container


def without_what_cannot_be_given(process: Process, spec: Spec) -> Process:
    """Return the process without capabilities that it cannot be given; a warning names them."""
    kept, missing = grantable(process, in_user_namespace=spec.linux.namespace("user") is not None)
    if missing:
        log.warning(f"/process/capabilities: unknown here, or not in the runtime's own bounding set: {', '.join(missing)}")
    return kept


def check_sysctls(spec: Spec) -> None:
    """Refuse parameters of a namespace that is joined and is the host's. Raises: SpecError."""
    for namespace in spec.linux.namespaces:
        if not namespace.path or not spec.linux.sysctl:
            continue
        file = NAMESPACES[namespace.type][1]
        with contextlib.suppress(OSError):
            joined, own = os.stat(namespace.path), os.stat(f"/proc/self/ns/{file}")
            kinds = {validate.sysctl_namespace(name) for name in spec.linux.sysctl}
            if (joined.st_dev, joined.st_ino) == (own.st_dev, own.st_ino) and namespace.type in kinds:
                raise SpecError(
                    f"/linux/sysctl: the {namespace.type} namespace is the host's: its parameters would change the host"
                )


def systemd_scope(spec: Spec, container_id: str) -> systemd.Scope:
    """Return the scope that systemd is to make. Raises: Unsupported without systemd; SpecError."""
    if not systemd.available():
        raise Unsupported("--systemd-cgroup: systemd does not run on this host", hint="leave the option out")
    return systemd.Scope(*systemd.names(spec.linux.cgroups_path, container_id))


def cgroups_path(spec: Spec, scope: systemd.Scope | None) -> str | None:
    """Return the path of the container's cgroups: the document's, or where systemd makes the scope."""
    return spec.linux.cgroups_path if scope is None else systemd.cgroup_of(scope.slice, scope.unit)


def timestamp() -> str:
    """Return the time as RFC 3339 writes it, in UTC."""
    now = time.time_ns()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now // 1_000_000_000))}.{now % 1_000_000_000:09d}Z"


def owner() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())
