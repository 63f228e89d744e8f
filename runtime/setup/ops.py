"""The operations that build a container's file system and names, as values.

`runtime.setup.plan` decides them, `runtime.process.perform` carries them out. Every path is inside the
container's root; none is ever resolved by the kernel's ordinary rules before `PivotRoot`.
"""

from __future__ import annotations

from runtime.spec.config import IdMapping
from runtime.values import Value


class IdMap(Value):
    """Show the owners of a mount's files by the mappings of a user namespace."""

    recursive: bool
    uids: tuple[IdMapping, ...]
    gids: tuple[IdMapping, ...]


class Mount(Value):
    """Mount a file system, or bind a path of the host."""

    source: str
    destination: str
    fstype: str
    flags: int
    data: str
    propagation: tuple[int, ...] = ()
    cleared: int = 0  # flags that must be off
    recursive_set: int = 0
    recursive_clear: int = 0
    copy_up: bool = False
    idmap: IdMap | None = None
    # The number of a detached mount that the verb opened for it: in a user namespace the source may be out of reach.
    tree: int | None = None


class MountCgroup(Value):
    """Mount the container's view of the cgroup tree, v1, v2 or hybrid as the host has it."""

    destination: str
    flags: int
    data: str
    own_namespace: bool


class MakeNode(Value):
    """Make a device node or FIFO."""

    path: str
    type: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int


class Symlink(Value):
    """Make a symbolic link; one that is there is left alone."""

    target: str
    path: str


class PivotRoot(Value):
    """Make the rootfs the root of the mount namespace, and let go of the host's."""


class RemountReadonly(Value):
    """Make one mount read-only, keeping its other flags."""

    path: str


class ReadonlyPath(Value):
    """Make a path read-only by binding it onto itself; one that is not there is no error."""

    path: str


class MaskPath(Value):
    """Hide a path: a file behind /dev/null, a directory behind an empty tmpfs; one that is not there is no error."""

    path: str


class SetPropagation(Value):
    """Set the propagation of the root mount."""

    flags: int


class Sysctl(Value):
    """Write a kernel parameter of one of the container's own namespaces."""

    name: str
    value: str


class Hostname(Value):
    name: str


class Domainname(Value):
    name: str


class LoopbackUp(Value):
    """Bring the loopback interface of a new network namespace up."""


Op = (
    Mount
    | MountCgroup
    | MakeNode
    | Symlink
    | PivotRoot
    | RemountReadonly
    | ReadonlyPath
    | MaskPath
    | SetPropagation
    | Sysctl
    | Hostname
    | Domainname
    | LoopbackUp
)
