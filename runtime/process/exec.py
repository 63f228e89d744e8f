"""Run one more process inside a container: join its namespaces and cgroups, then become the process asked for."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from runtime.errors import ContainerError, KernelError
from runtime.files import forget_locks
from runtime.linux import const, namespace
from runtime.linux.const import NAMESPACES
from runtime.linux.process import clone, die_with_parent, prctl
from runtime.process import confine, console, identity
from runtime.process.confine import Confinement
from runtime.process.execute import execute
from runtime.process.handshake import Channel
from runtime.process.init import fail, join_keyring
from runtime.process.inside import clone_inside
from runtime.spec.config import Process
from runtime.spec.validate import cpu_set


def spawn(
    init_pid: int,
    pidfd: int,
    process: Process,
    preserve_fds: int,
    last_capability: int,
    confinement: Confinement,
    keyring: str | None,
    on_pid: Callable[[int], None],
    on_console: Callable[[int], None],
    on_listener: Callable[[int, int], None],
) -> int:
    """Start a process in the namespaces of `init_pid`, which `pidfd` means; return its pid once it has been executed.

    `on_pid` puts it into the container's cgroups; `on_console` takes the master of its terminal; `on_listener` its
    pid and the listener of its seccomp filter.

    Raises: ContainerError; then the process is dead and reaped.
    """
    flags = foreign_namespaces(init_pid)
    ours, theirs = Channel.pair()
    gc.freeze()
    if os.geteuid() == 0:  # what an ordinary user could lose by this, the user has already
        prctl(const.PR_SET_DUMPABLE, 0)  # before the child is in the container's pid namespace
    # These two first and from a process of their own: the one gives the right to the others, the other is for children.
    early = flags & (const.CLONE_NEWUSER | const.CLONE_NEWPID)

    def child() -> NoReturn:
        forget_locks()
        ours.close()
        _main(pidfd, flags, process, preserve_fds, last_capability, confinement, keyring, theirs)

    if early & const.CLONE_NEWUSER:
        pid = clone_inside(lambda: namespace.setns(pidfd, early), 0, child)
    else:
        if early:
            namespace.setns(pidfd, early)
        pid = clone(0)
        if pid == 0:
            child()
    theirs.close()
    os.close(pidfd)
    try:
        before, after = process.exec_cpu_affinity
        if before:
            _set_affinity(pid, before)
        on_pid(pid)
        if after:
            _set_affinity(pid, after)
        identity.limit(pid, process)
        ours.send({"go": True})
        ready = False
        while True:
            message, fd = ours.receive()
            if message is None and not ready:
                raise ContainerError("the process ended before it could be executed")
            if message is None:
                break  # EOF: execve succeeded
            if "console" in message and fd is not None:
                on_console(fd)
            elif "seccomp" in message and fd is not None:
                on_listener(pid, fd)
            elif "ready" in message:
                ready = True
                ours.send({"go": True})
        return pid
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        raise
    finally:
        ours.close()


def _set_affinity(pid: int, cpus: str) -> None:
    try:
        os.sched_setaffinity(pid, cpu_set(cpus))
    except OSError as e:
        raise KernelError(f"/process/execCPUAffinity: cannot run on processors {cpus}", e.errno or 0) from e


def foreign_namespaces(pid: int) -> int:
    """Return the clone flags of the namespaces in which another process is and we are not. Raises: KernelError."""
    flags = 0
    for flag, name in NAMESPACES.values():
        try:
            if os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"):
                flags |= flag
        except OSError as e:
            raise KernelError(f"cannot read the namespaces of process {pid}", e.errno or 0) from e
    return flags


def _main(
    pidfd: int,
    flags: int,
    process: Process,
    preserve_fds: int,
    last_capability: int,
    confinement: Confinement,
    keyring: str | None,
    channel: Channel,
) -> NoReturn:
    try:
        die_with_parent()
        channel.expect("go")
        labels = confine.open_labels(confinement)
        if late := flags & ~(const.CLONE_NEWUSER | const.CLONE_NEWPID):
            namespace.setns(pidfd, late)
        os.setsid()
        if keyring is not None:
            join_keyring(keyring)
        if flags & const.CLONE_NEWUSER:
            identity.become_root()
            die_with_parent()
        if process.terminal:
            console.attach(process, channel, bind_console=False)
        else:
            console.reopen_null()
            console.give_stdio(process.user.uid)
        env = identity.environment(process)
        later = identity.become(process, last_capability, confinement)
        command = identity.find_command(process, env)
        channel.send({"ready": True})
        channel.expect("go")
        prctl(const.PR_SET_PDEATHSIG, 0)
        execute(command, process, env, preserve_fds, confinement, labels, later, channel)
    except ContainerError as e:
        fail(channel, e)
    except BaseException as e:
        fail(channel, ContainerError(f"{type(e).__name__}: {e}"))


def write_pid_file(path: str, pid: int) -> None:
    """Write a pid file so that a reader finds the whole number or no file. Raises: ContainerError."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(str(pid))
        temporary.rename(target)
    except OSError as e:
        raise KernelError(f"cannot write pid file {path}", e.errno or 0) from e
