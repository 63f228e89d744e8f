"""Spec -> SetupPlan: the operations in the order in which they must happen. Pure."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from runtime.errors import SpecError
from runtime.linux import const
from runtime.setup import ops
from runtime.spec import mount_options
from runtime.spec.config import Device, DeviceRule, Mount, Spec

DEFAULT_DEVICES = tuple(
    Device(f"/dev/{name}", "c", major, minor, 0o666, 0, 0)
    for name, major, minor in (
        ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
    )
)  # fmt: skip

# What every container may do with devices, whatever its config says: make nodes, and use the harmless ones.
DEFAULT_DEVICE_RULES = (
    DeviceRule(True, "c", None, None, "m"),
    DeviceRule(True, "b", None, None, "m"),
    *(DeviceRule(True, "c", d.major, d.minor, "rwm") for d in DEFAULT_DEVICES),
    DeviceRule(True, "c", 136, None, "rwm"),  # pseudo-terminals
    DeviceRule(True, "c", 5, 2, "rwm"),  # ptmx
)

DEV_LINKS = (
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
)

# Parameters that belong to a namespace, by the namespace's type: others would change the host.
_IPC_SYSCTLS = frozenset(
    ["kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni"]
    + ["kernel.shm_rmid_forced"]
)


@dataclass(frozen=True, slots=True)
class SetupPlan:
    """`before_hooks` up to the createContainer hooks, `after_hooks` from pivot_root on."""

    before_hooks: tuple[ops.Op, ...]
    after_hooks: tuple[ops.Op, ...]


def destination(path: str) -> str:
    """Return a destination as an absolute path without `..` that climbs; links are resolved when it is opened."""
    return posixpath.normpath("/" + path.lstrip("/"))  # POSIX keeps two leading slashes


def plan(spec: Spec, bundle: str) -> SetupPlan:
    """Decide how the container is built. Raises: SpecError, Unsupported."""
    linux = spec.linux
    before: list[ops.Op] = []
    if (network := linux.namespace("network")) and not network.path:
        before.append(ops.LoopbackUp())
    read_only_later = []
    for mount in spec.mounts:
        op = _mount(mount, bundle, own_cgroup_namespace=linux.namespace("cgroup") is not None)
        # Nodes are still to be made in /dev: it becomes read-only at the end.
        if isinstance(op, ops.Mount) and op.destination == "/dev" and op.flags & const.MS_RDONLY:
            op = ops.Mount(op.source, op.destination, op.fstype, op.flags & ~const.MS_RDONLY, op.data, op.propagation)
            read_only_later.append(ops.RemountReadonly("/dev"))
        before.append(op)
    if needs_devices(spec):
        devices = {d.path: d for d in (*DEFAULT_DEVICES, *linux.devices)}
        before += [ops.MakeNode(d.path, d.type, d.major, d.minor, d.file_mode, d.uid, d.gid) for d in devices.values()]
        before += [ops.Symlink(target, path) for target, path in DEV_LINKS]
        before.append(ops.Symlink("pts/ptmx", "/dev/ptmx"))
    after: list[ops.Op] = [ops.PivotRoot()]
    propagation = mount_options.PROPAGATION.get(linux.rootfs_propagation or "private")
    if propagation is None:
        raise SpecError(f"/linux/rootfsPropagation: {linux.rootfs_propagation!r} is no propagation mode")
    if linux.rootfs_propagation:
        after.append(ops.SetPropagation(propagation))
    after += read_only_later
    if spec.hostname:
        after.append(ops.Hostname(spec.hostname))
    if spec.domainname:
        after.append(ops.Domainname(spec.domainname))
    for name, value in (linux.sysctl or {}).items():
        _check_sysctl(spec, name)
        after.append(ops.Sysctl(name, value))
    if spec.root_readonly:
        after.append(ops.RemountReadonly("/"))
    after += [ops.ReadonlyPath(destination(p)) for p in linux.readonly_paths]
    after += [ops.MaskPath(destination(p)) for p in linux.masked_paths]
    return SetupPlan(tuple(before), tuple(after))


def needs_devices(spec: Spec) -> bool:
    """Say whether /dev is ours to fill: not when the host's own is bound there."""
    return not any(
        destination(m.destination) == "/dev" and (m.type == "bind" or {"bind", "rbind"} & set(m.options)) for m in spec.mounts
    )


def bind_mounts(spec: Spec, bundle: str) -> dict[str, str]:
    """Return destination -> source of every path of the host that is mounted into the container."""
    found = {}
    for mount in spec.mounts:
        op = _mount(mount, bundle, own_cgroup_namespace=True)
        if isinstance(op, ops.Mount) and op.flags & const.MS_BIND:
            found[op.destination] = op.source
    return found


def _mount(mount: Mount, bundle: str, own_cgroup_namespace: bool) -> ops.Op:
    options = mount_options.parse(mount.options)
    path = destination(mount.destination)
    if mount.type == "cgroup":
        return ops.MountCgroup(path, options.flags, options.data, own_cgroup_namespace)
    flags, source = options.flags, mount.source
    if mount.type in ("bind", "rbind"):
        flags |= const.MS_BIND | (const.MS_REC if mount.type == "rbind" else 0)
    if flags & const.MS_BIND:
        if not source:
            raise SpecError(f"mount of {mount.destination}: a bind mount needs a source")
        source = posixpath.join(bundle, source)
    elif not mount.type:
        raise SpecError(f"mount of {mount.destination}: needs a type")
    return ops.Mount(source, path, mount.type, flags, options.data, options.propagation)


def _check_sysctl(spec: Spec, name: str) -> None:
    key = name.replace("/", ".") if "/" in name and "." not in name else name
    if key in _IPC_SYSCTLS or key.startswith("fs.mqueue."):
        needed = "ipc"
    elif key.startswith("net."):
        needed = "network"
    elif key in ("kernel.domainname", "kernel.hostname"):
        needed = "uts"
    else:
        raise SpecError(f"/linux/sysctl/{name}: is not a parameter of a namespace", hint="it would change the host")
    namespace = spec.linux.namespace(needed)
    if namespace is None:
        raise SpecError(f"/linux/sysctl/{name}: needs a {needed} namespace of the container's own")
