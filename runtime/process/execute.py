"""The last step of every process that we make: filter, last capabilities, execve."""

from __future__ import annotations

import fcntl
import gc
import os
from typing import NoReturn

from runtime.errors import CommandNotExecutable, ContainerError, KernelError, Unsupported
from runtime.linux import execstub
from runtime.linux.process import close_from, reset_signals
from runtime.process import identity
from runtime.process.confine import Confinement, write_labels
from runtime.process.handshake import Channel
from runtime.spec.config import Process


def execute(
    command: str,
    process: Process,
    env: dict[str, str],
    preserve_fds: int,
    confinement: Confinement,
    labels: list[tuple[int, str]],
    later: identity.Later | None,
    channel: Channel,
) -> NoReturn:
    """Replace this process by the container's; `channel` closes with that, or gets the errno.

    Raises: CommandNotExecutable, KernelError, Unsupported; ContainerError for a profile that execveat cannot pass.
    """
    reset_signals()
    write_labels(labels)
    first = 3 + preserve_fds
    close_from(first)
    error_fd = fcntl.fcntl(channel.sock, fcntl.F_DUPFD, first)
    found = confinement.filter
    # The stub can load a filter that needs no capability, and no listener handed on: then none of our calls is filtered.
    in_stub = found is not None and process.no_new_privileges and not found.listens and execstub.SUPPORTED
    bpf, flags = (found.bpf, found.flags) if found is not None and in_stub else (b"", 0)
    if found is not None and not in_stub and not found.allows_execveat and execstub.SUPPORTED:
        raise ContainerError(
            "/linux/seccomp: the profile must allow execveat", hint="or set /process/noNewPrivileges: then execve is enough"
        )
    stub = execstub.make(command, error_fd, bpf, flags)
    if stub is None and execstub.SUPPORTED:
        raise Unsupported("this kernel lets no memory file be executed", hint="sysctl vm.memfd_noexec=1")
    vector = execstub.Vector(process.args, [f"{k}={v}" for k, v in env.items()])
    loader = None if found is None or in_stub else found.loader()
    gc.disable()
    if loader is not None and found is not None:
        try:
            listener = loader.load()
        except OSError as e:
            raise KernelError("/linux/seccomp: the kernel refuses the filter", e.errno or 0) from e
        if found.listens:
            channel.send({"seccomp": True}, listener)
            os.close(listener)
    if later is not None:
        later.drop()
    try:
        if stub is not None:
            execstub.execute(stub, vector)
        os.close(error_fd)
        os.execve(command, process.args, env)
    except OSError as e:
        raise CommandNotExecutable(f'exec: "{process.args[0]}": {(e.strerror or "").lower()}') from e
