"""A container's first process, from clone to execve: it builds the container around itself.

Everything it needs is imported before, since nothing can be imported after pivot_root. The picture is in
`handshake`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from typing import Any, NoReturn

from runtime.cgroups.layout import Layout
from runtime.errors import CommandNotExecutable, ContainerError, KernelError
from runtime.linux import const, namespace
from runtime.linux.process import close_from, die_with_parent, new_session_keyring, prctl, reset_signals
from runtime.process import console, identity
from runtime.process.handshake import Channel, wait_for_start
from runtime.process.hooks import run_hooks
from runtime.process.perform import Performer
from runtime.setup.plan import SetupPlan
from runtime.spec.config import Process, Spec


@dataclass(frozen=True, slots=True)
class InitOrders:
    """All that the first process must know; it gets them by being a clone."""

    spec: Spec
    process: Process
    plan: SetupPlan
    rootfs: str
    bundle: str
    container_id: str
    layout: Layout
    cgroup_paths: dict[str, str]
    join: tuple[tuple[int, int], ...]  # (descriptor of a namespace, its clone flag)
    new_cgroup_namespace: bool
    no_pivot: bool
    new_keyring: bool
    preserve_fds: int
    last_capability: int
    hook_state: dict[str, Any]


def main(orders: InitOrders, channel: Channel, listener: socket.socket) -> NoReturn:
    """Build the container, wait to be started, become the container's process. Never returns."""
    try:
        _main(orders, channel, listener)
    except ContainerError as e:
        _fail(channel, e)
    except BaseException as e:
        _fail(channel, ContainerError(f"{type(e).__name__} in the container's first process: {e}"))


def _fail(channel: Channel, error: ContainerError) -> NoReturn:
    with contextlib.suppress(BaseException):
        channel.send({"error": error.as_dict()})
    os._exit(error.exit_code)


def _main(orders: InitOrders, channel: Channel, listener: socket.socket) -> NoReturn:
    process, spec = orders.process, orders.spec
    die_with_parent()
    # What runs inside may look at its first process only once that is the container's own program.
    prctl(const.PR_SET_DUMPABLE, 0)
    channel.expect("go")
    for fd, flag in orders.join:
        if flag != const.CLONE_NEWPID:  # its children are in it: the parent joined that before the clone
            namespace.setns(fd, flag)
    if orders.new_cgroup_namespace:
        namespace.unshare(const.CLONE_NEWCGROUP)
    os.setsid()
    if orders.new_keyring:
        try:
            new_session_keyring(f"_ses.{orders.container_id}")
        except OSError as e:
            if e.errno not in (errno.ENOSYS, errno.EPERM):
                raise KernelError("cannot join a new session keyring", e.errno or 0) from e
    performer = Performer(orders.rootfs, orders.layout, orders.cgroup_paths, orders.no_pivot)
    performer.run(orders.plan.before_hooks)
    channel.send({"hooks": True})
    channel.expect("go")
    run_hooks(spec.hooks.get("createContainer", ()), "createContainer", orders.hook_state, cwd=orders.rootfs)
    performer.run(orders.plan.after_hooks)
    os.close(performer.root_fd)
    if process.terminal:
        console.attach(process, channel, bind_console=True)
    else:
        console.reopen_null()
        console.give_stdio(process.user.uid)
    env = identity.environment(process)
    _make_cwd(process.cwd)
    identity.become(process, orders.last_capability)
    command = identity.find_command(process, env)
    channel.send({"ready": True})
    channel.expect("go")
    # Credentials were changed above, which clears the parent-death signal only sometimes.
    prctl(const.PR_SET_PDEATHSIG, 0)
    channel.close()
    starter = wait_for_start(listener)
    _execute(orders, starter, command, env)


def _make_cwd(cwd: str) -> None:
    """Make the working directory as runc does; where that cannot be, chdir gives the error."""
    with contextlib.suppress(OSError):
        os.makedirs(cwd, 0o755, exist_ok=True)


def _execute(orders: InitOrders, starter: Channel, command: str, env: dict[str, str]) -> NoReturn:
    try:
        hooks = orders.spec.hooks.get("startContainer", ())
        run_hooks(hooks, "startContainer", {**orders.hook_state, "status": "created"})
        execute(command, orders.process, env, orders.preserve_fds)
    except ContainerError as e:
        _fail(starter, e)
    except BaseException as e:
        _fail(starter, ContainerError(f"{type(e).__name__}: {e}"))


def execute(command: str, process: Process, env: dict[str, str], preserve_fds: int) -> NoReturn:
    """Replace this process by the container's. Raises: CommandNotExecutable."""
    reset_signals()
    close_from(3 + preserve_fds)
    try:
        os.execve(command, process.args, env)
    except OSError as e:
        raise CommandNotExecutable(f'exec: "{process.args[0]}": {(e.strerror or "").lower()}') from e
