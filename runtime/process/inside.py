"""Clone a child from within other namespaces without going there oneself."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NoReturn

from runtime.errors import KernelError
from runtime.linux.const import CLONE_PARENT
from runtime.linux.process import clone


def clone_inside(join: Callable[[], None], flags: int, child: Callable[[], NoReturn]) -> int:
    """Return the pid of a child of ours that was cloned where `join` leads.

    A process that ends at once calls `join` and clones with CLONE_PARENT: new namespaces then belong to a joined user
    namespace, and the child is still ours to wait for.

    Raises: KernelError.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    helper = clone(0)
    if helper == 0:
        try:
            join()
            pid = clone(flags | CLONE_PARENT)
            if pid == 0:
                os.close(read)
                os.close(write)
                child()
            os.write(write, f"{pid}".encode())
            os._exit(0)
        except OSError as e:
            os.write(write, f"!{e.errno}".encode())
        finally:
            os._exit(1)
    os.close(write)
    try:
        answer = os.read(read, 64).decode()
    finally:
        os.close(read)
        os.waitpid(helper, 0)
    if answer.isdigit():
        return int(answer)
    raise KernelError("/linux/namespaces: cannot join the namespaces", int(answer[1:] or errno.ECHILD))
