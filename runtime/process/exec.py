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
from runtime.linux.process import clone, die_with_parent, pidfd_open, prctl
from runtime.process import console, identity
from runtime.process.handshake import Channel
from runtime.process.init import execute
from runtime.spec.config import Process


def spawn(
    init_pid: int,
    process: Process,
    preserve_fds: int,
    last_capability: int,
    on_pid: Callable[[int], None],
    on_console: Callable[[int], None],
) -> int:
    """Start a process in the namespaces of `init_pid`; return its pid once it is past all that can fail but execve.

    `on_pid` puts it into the container's cgroups; `on_console` takes the master of its terminal.

    Raises: ContainerError; then the process is dead and reaped.
    """
    pidfd = pidfd_open(init_pid)
    flags = foreign_namespaces(init_pid)
    ours, theirs = Channel.pair()
    if flags & const.CLONE_NEWPID:
        namespace.setns(pidfd, const.CLONE_NEWPID)  # takes effect for children
    gc.freeze()
    prctl(const.PR_SET_DUMPABLE, 0)  # before the child is in the container's pid namespace
    pid = clone(0)
    if pid == 0:
        forget_locks()
        ours.close()
        _main(pidfd, flags & ~const.CLONE_NEWPID, process, preserve_fds, last_capability, theirs)
    theirs.close()
    os.close(pidfd)
    try:
        on_pid(pid)
        identity.limit(pid, process)
        ours.send({"go": True})
        while True:
            message, fd = ours.receive()
            if message is None:
                raise ContainerError("the process ended before it could be executed")
            if "console" in message and fd is not None:
                on_console(fd)
            elif "ready" in message:
                break
        ours.send({"go": True})
        ours.receive()  # EOF: execve succeeded
        return pid
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        raise
    finally:
        ours.close()


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


def _main(pidfd: int, flags: int, process: Process, preserve_fds: int, last_capability: int, channel: Channel) -> NoReturn:
    try:
        die_with_parent()
        channel.expect("go")
        if flags:
            namespace.setns(pidfd, flags)
        os.setsid()
        if process.terminal:
            console.attach(process, channel, bind_console=False)
        else:
            console.reopen_null()
            console.give_stdio(process.user.uid)
        env = identity.environment(process)
        identity.become(process, last_capability)
        command = identity.find_command(process, env)
        channel.send({"ready": True})
        channel.expect("go")
        prctl(const.PR_SET_PDEATHSIG, 0)
        execute(command, process, env, preserve_fds)
    except ContainerError as e:
        _fail(channel, e)
    except BaseException as e:
        _fail(channel, ContainerError(f"{type(e).__name__}: {e}"))


def _fail(channel: Channel, error: ContainerError) -> NoReturn:
    with contextlib.suppress(BaseException):
        channel.send({"error": error.as_dict()})
    os._exit(error.exit_code)


def write_pid_file(path: str, pid: int) -> None:
    """Write a pid file so that a reader finds the whole number or no file. Raises: ContainerError."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(str(pid))
        temporary.rename(target)
    except OSError as e:
        raise KernelError(f"cannot write pid file {path}", e.errno or 0) from e
