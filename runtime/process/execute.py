"""The last step of every process that we make: filter, last capabilities, execve."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
from typing import NoReturn

from runtime.errors import CommandNotExecutable, KernelError
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

    Raises: CommandNotExecutable, KernelError.
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
    stub = None
    if found is None or in_stub or found.allows_execveat:
        stub = execstub.make(command, error_fd, bpf, flags)
        in_stub = in_stub and stub is not None
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
            try:
                execstub.execute(stub, vector)
            except OSError as e:
                if e.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS):
                    raise
        os.close(error_fd)
        os.execve(command, process.args, env)
    except OSError as e:
        raise CommandNotExecutable(f'exec: "{process.args[0]}": {(e.strerror or "").lower()}') from e
