"""Detached mounts: bind mounts that the verb opens with its own rights, for the container's first process to attach."""

from __future__ import annotations

import errno
import os

from runtime.errors import ContainerError, KernelError, Unsupported
from runtime.linux import const, namespace
from runtime.linux import mount as m
from runtime.linux.process import clone
from runtime.process.handshake import Channel
from runtime.process.userns import open_with_mappings
from runtime.setup import ops
from runtime.setup.plan import SetupPlan


def send_trees(plan: SetupPlan, pid: int, channel: Channel) -> None:
    """Open what the plan's operations have numbers for, and send it to the container's first process.

    They are opened with the verb's rights, but in the process's mount namespace: its copies of the host's mounts have
    the host's flags locked, so that nobody in a user namespace can take a read-only mount's flag off.

    Raises: ContainerError; Unsupported where a file system cannot be id-mapped.
    """
    wanted = [op for op in plan.before_hooks if isinstance(op, ops.Mount) and op.tree is not None]
    if not wanted:
        return
    mounts = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    ours, theirs = Channel.pair()
    helper = clone(0)
    if helper == 0:
        try:
            namespace.setns(mounts, const.CLONE_NEWNS)
            for op in wanted:
                fd = _open(op)
                channel.send({"tree": op.tree}, fd)
                os.close(fd)
            theirs.send({"done": True})
        except ContainerError as e:
            theirs.send({"error": e.as_dict()})
        except BaseException as e:
            theirs.send({"error": {"message": f"cannot open the sources of bind mounts: {e}"}})
        finally:
            os._exit(0)
    theirs.close()
    os.close(mounts)
    try:
        ours.expect("done")
    finally:
        ours.close()
        os.waitpid(helper, 0)


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
