"""Make a container's first process: the parent's side of the handshake."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, NoReturn

from runtime.errors import ContainerError, KernelError
from runtime.files import forget_locks
from runtime.linux import namespace
from runtime.linux.const import NAMESPACES
from runtime.linux.process import clone
from runtime.process import init, trees, userns
from runtime.process.handshake import Channel
from runtime.process.identity import limit
from runtime.process.inside import clone_inside
from runtime.spec.config import Namespace, Spec


def namespace_flags(spec: Spec) -> int:
    """Return the clone flags of the namespaces that are to be new.

    Two are made later, by unshare: the cgroup one's root is where its maker is, which must be the container's cgroup
    by then; the time one's offsets must be written while nobody is in it.
    """
    flags = 0
    for n in spec.linux.namespaces:
        if not n.path and n.type not in ("cgroup", "time"):
            flags |= NAMESPACES[n.type][0]
    return flags


def open_namespaces(namespaces: tuple[Namespace, ...]) -> tuple[tuple[int, int], ...]:
    """Open the namespaces that are joined by path, in the order in which they must be joined. Raises: KernelError."""
    opened = []
    for kind, (flag, _) in NAMESPACES.items():
        for n in namespaces:
            if n.type == kind and n.path:
                try:
                    opened.append((os.open(n.path, os.O_RDONLY | os.O_CLOEXEC), flag))
                except OSError as e:
                    raise KernelError(f"/linux/namespaces: cannot open {n.type} namespace {n.path}", e.errno or 0) from e
    return tuple(opened)


def spawn(
    orders: init.InitOrders,
    joins: tuple[tuple[int, int], ...],
    listener: socket.socket,
    on_pid: Callable[[int], None],
    on_hooks: Callable[[], None],
    on_console: Callable[[int], None],
) -> int:
    """Clone the first process and lead it to where it waits for `start`; return its pid.

    `joins` are the namespaces to join, as (descriptor, clone flag); `on_pid` records the process and puts it into its
    cgroups; `on_hooks` runs the hooks that belong before pivot_root; `on_console` takes the master of its terminal.

    Raises: ContainerError; then the process is dead and reaped.
    """
    ours, theirs = Channel.pair()
    flags = namespace_flags(orders.spec)
    gc.freeze()  # what the child inherits is not its garbage to look through

    def child() -> NoReturn:
        forget_locks()
        ours.close()
        init.main(orders, theirs, listener)

    if joins:
        pid = clone_inside(lambda: _join(joins), flags, child)
    else:
        pid = clone(flags)
        if pid == 0:
            child()
    theirs.close()
    try:
        linux = orders.spec.linux
        if linux.makes("user"):
            userns.map_ids(pid, linux.uid_mappings, linux.gid_mappings)
        trees.send_trees(orders.plan, pid, ours)
        on_pid(pid)
        limit(pid, orders.process)
        ours.send({"go": True})
        _lead(ours, on_hooks, on_console)
        return pid
    except BaseException as e:
        status = _kill(pid)
        if isinstance(e, ContainerError) and "handshake" in e.message:
            hint = "is the memory limit too low for it?" if status == -signal.SIGKILL else None
            raise ContainerError(f"the container's first process ended early, with status {status}", hint=hint) from e
        raise
    finally:
        ours.close()


def _join(joins: tuple[tuple[int, int], ...]) -> None:
    for fd, flag in joins:
        namespace.setns(fd, flag)


def _lead(channel: Channel, on_hooks: Callable[[], None], on_console: Callable[[int], None]) -> None:
    while True:
        message, fd = channel.receive()
        if message is None:
            raise ContainerError("the process at the other end of the handshake is gone")
        if "hooks" in message:
            on_hooks()
            channel.send({"go": True})
        elif "console" in message and fd is not None:
            on_console(fd)
        elif "ready" in message:
            channel.send({"go": True})
            end: Any = channel.receive()
            if end != (None, None):
                raise ContainerError(f"handshake out of order: {end} after ready")
            return


def _kill(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return -signal.SIGKILL
