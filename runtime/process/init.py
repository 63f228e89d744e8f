"""A container's first process, from clone to execve: it builds the container around itself.

Everything it needs is imported before, since nothing can be imported after pivot_root. The picture is in
`handshake`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import Any, NoReturn

from runtime.cgroups.layout import Layout
from runtime.errors import ContainerError, KernelError
from runtime.linux import const, namespace
from runtime.linux.process import die_with_parent, new_session_keyring, prctl
from runtime.process import confine, console, identity
from runtime.process.confine import Confinement
from runtime.process.execute import execute
from runtime.process.handshake import Channel, wait_for_start
from runtime.process.hooks import run_hooks, run_inside
from runtime.process.perform import Performer
from runtime.setup.plan import SetupPlan
from runtime.spec import mount_options
from runtime.spec.config import Process, Spec
from runtime.values import Value


class InitOrders(Value):
    """All that the first process must know; it gets them by being a clone."""

    spec: Spec
    process: Process
    plan: SetupPlan
    rootfs: str
    container_id: str
    layout: Layout
    cgroup_paths: dict[str, str]
    no_pivot: bool
    new_keyring: bool
    preserve_fds: int
    last_capability: int
    confinement: Confinement
    hook_state: dict[str, Any]


def main(orders: InitOrders, channel: Channel, listener: socket.socket) -> NoReturn:
    """Build the container, wait to be started, become the container's process. Never returns."""
    try:
        _main(orders, channel, listener)
    except ContainerError as e:
        fail(channel, e)
    except BaseException as e:
        fail(channel, ContainerError(f"{type(e).__name__} in the container's first process: {e}"))


def fail(channel: Channel, error: ContainerError) -> NoReturn:
    """Tell the other side why, and end."""
    with contextlib.suppress(BaseException):
        channel.send({"error": error.as_dict()})
    os._exit(error.exit_code)


def _main(orders: InitOrders, channel: Channel, listener: socket.socket) -> NoReturn:
    process, spec = orders.process, orders.spec
    die_with_parent()
    trees = _wait_for_go(channel)
    if spec.linux.makes("time"):
        _new_time_namespace(spec)
    # What runs inside may look at its first process only once that is the container's own program. Not earlier: an
    # ordinary user's verb could not write our id mappings, nor we the clocks' offsets.
    prctl(const.PR_SET_DUMPABLE, 0)
    if spec.linux.makes("cgroup"):
        namespace.unshare(const.CLONE_NEWCGROUP)
    os.setsid()
    if orders.new_keyring:
        join_keyring(f"_ses.{orders.container_id}")
    labels = confine.open_labels(orders.confinement)
    # Before the user namespace's root is taken on: the host's root may pass directories that that one may not.
    performer = Performer(
        orders.rootfs,
        orders.layout,
        orders.cgroup_paths,
        no_pivot=orders.no_pivot,
        propagation=mount_options.PROPAGATION.get(spec.linux.rootfs_propagation or "", 0),
        trees=trees,
    )
    if spec.linux.namespace("user"):
        identity.become_root()
        die_with_parent()  # changing credentials took that back
    performer.run(orders.plan.before_hooks)
    channel.send({"hooks": True})
    channel.expect("go")
    state = {**orders.hook_state, "pid": os.getpid()}  # as it is seen where these hooks run
    run_hooks(spec.hooks.get("createContainer", ()), "createContainer", state, cwd=orders.rootfs)
    performer.run(orders.plan.after_hooks)
    os.close(performer.root_fd)
    if process.terminal:
        console.attach(process, channel, bind_console=True)
    else:
        console.reopen_null()
        console.give_stdio(process.user.uid)
    env = identity.environment(process)
    _make_cwd(process.cwd)
    later = identity.become(process, orders.last_capability, orders.confinement)
    command = identity.find_command(process, env)
    channel.send({"ready": True})
    channel.expect("go")
    # Credentials were changed above, which clears the parent-death signal only sometimes.
    prctl(const.PR_SET_PDEATHSIG, 0)
    channel.close()
    starter = wait_for_start(listener)
    try:
        hooks = orders.spec.hooks.get("startContainer", ())
        run_inside(hooks, "startContainer", {**state, "status": "created"})
        execute(command, process, env, orders.preserve_fds, orders.confinement, labels, later, starter)
    except ContainerError as e:
        fail(starter, e)
    except BaseException as e:
        fail(starter, ContainerError(f"{type(e).__name__}: {e}"))


def join_keyring(name: str) -> None:
    """Leave the caller's session keyring for the container's, where the kernel has keyrings. Raises: KernelError."""
    try:
        new_session_keyring(name)
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.EPERM):
            raise KernelError(f"cannot join session keyring {name}", e.errno or 0) from e


def _wait_for_go(channel: Channel) -> dict[int, int]:
    """Take the detached mounts that the verb sends, until it says go. Raises: ContainerError."""
    trees: dict[int, int] = {}
    while True:
        message, fd = channel.receive()
        if message is None:
            raise ContainerError("the process at the other end of the handshake is gone")
        if "go" in message:
            return trees
        if "tree" in message and fd is not None:
            trees[int(message["tree"])] = fd


def _new_time_namespace(spec: Spec) -> None:
    """Enter a new time namespace with the document's offsets; they can be set only while nobody is in it.

    Raises: KernelError. Source: time_namespaces(7).
    """
    try:
        namespace.unshare(const.CLONE_NEWTIME)
        for clock, (seconds, nanoseconds) in spec.linux.time_offsets.items():
            fd = os.open("/proc/self/timens_offsets", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, f"{clock} {seconds} {nanoseconds}".encode())
            finally:
                os.close(fd)
        fd = os.open("/proc/self/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespace.setns(fd, const.CLONE_NEWTIME)
        finally:
            os.close(fd)
    except OSError as e:
        raise KernelError("/linux/timeOffsets: cannot make a time namespace with these offsets", e.errno or 0) from e


def _make_cwd(cwd: str) -> None:
    """Make the working directory as runc does; where that cannot be, chdir gives the error."""
    with contextlib.suppress(OSError):
        os.makedirs(cwd, 0o755, exist_ok=True)
