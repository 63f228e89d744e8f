"""Detached mounts: bind mounts that the verb opens with its own rights, for the container's first process to attach."""

from __future__ import annotations

import errno
import os

from runtime.errors import ContainerError, KernelError, Unsupported
from runtime.files import close_all
from runtime.linux import const
from runtime.linux import mount as m
from runtime.process.userns import open_with_mappings
from runtime.setup import ops
from runtime.setup.plan import SetupPlan


def open_trees(plan: SetupPlan) -> dict[int, int]:
    """Open what the plan's operations have numbers for; return number -> descriptor.

    Raises: ContainerError; Unsupported where a file system cannot be id-mapped. Then none is left open.
    """
    opened: dict[int, int] = {}
    try:
        for op in plan.before_hooks:
            if isinstance(op, ops.Mount) and op.tree is not None:
                opened[op.tree] = _open(op)
    except BaseException:
        close_all(list(opened.values()))
        raise
    return opened


def _open(op: ops.Mount) -> int:
    recursive = bool(op.flags & const.MS_REC)
    try:
        fd = m.open_tree(op.source, recursive=recursive)
    except FileNotFoundError:
        raise ContainerError(f"cannot bind {op.source} on {op.destination}: the source does not exist") from None
    except OSError as e:
        raise KernelError(f"cannot bind {op.source} on {op.destination}", e.errno or 0) from e
    if op.idmap is None:
        return fd
    user_namespace = open_with_mappings(op.idmap.uids, op.idmap.gids)
    try:
        m.mount_setattr(fd, const.MOUNT_ATTR_IDMAP, 0, recursive=op.idmap.recursive, userns_fd=user_namespace)
    except OSError as e:
        os.close(fd)
        if e.errno in (errno.EINVAL, errno.ENOSYS):
            raise Unsupported(
                f"mount of {op.destination}: the file system of {op.source} cannot be id-mapped by this kernel",
                hint="see mount_setattr(2); or leave the options idmap and ridmap out",
            ) from e
        raise KernelError(f"cannot id-map the mount of {op.destination}", e.errno or 0) from e
    finally:
        os.close(user_namespace)
    return fd
