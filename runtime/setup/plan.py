"""Spec -> SetupPlan: the operations in the order in which they must happen. Pure."""

from __future__ import annotations

import posixpath

from runtime.linux import const
from runtime.setup import ops
from runtime.spec import mount_options
from runtime.spec.config import Device, IdMapping, Mount, Spec
from runtime.spec.resources import DeviceRule
from runtime.values import Value, replace

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


class SetupPlan(Value):
    """`before_hooks` up to the createContainer hooks, `after_hooks` from pivot_root on."""

    before_hooks: tuple[ops.Op, ...]
    after_hooks: tuple[ops.Op, ...]


def destination(path: str) -> str:
    """Return a destination as an absolute path without `..` that climbs; links are resolved when it is opened."""
    return posixpath.normpath("/" + path.lstrip("/"))  # POSIX keeps two leading slashes


def plan(spec: Spec, bundle: str, detach: bool = False) -> SetupPlan:
    """Decide how the container is built.

    With `detach` the sources of bind mounts are opened by the verb, not by the container's first process.
    """
    linux = spec.linux
    before: list[ops.Op] = []
    if linux.makes("network"):
        before.append(ops.LoopbackUp())
    if spec.hostname:
        before.append(ops.Hostname(spec.hostname))
    if spec.domainname:
        before.append(ops.Domainname(spec.domainname))
    # By the host's /proc, which shows every process its own namespaces' parameters and is nobody's to fake.
    before += [ops.Sysctl(name, value) for name, value in linux.sysctl.items()]
    read_only_later = []
    for number, mount in enumerate(spec.mounts):
        op = _mount(spec, mount, bundle, number, detach)
        # Nodes are still to be made in /dev: it becomes read-only at the end.
        if isinstance(op, ops.Mount) and op.destination == "/dev" and op.flags & const.MS_RDONLY and op.fstype == "tmpfs":
            op = replace(op, flags=op.flags & ~const.MS_RDONLY)
            read_only_later.append(ops.RemountReadonly("/dev"))
        before.append(op)
    if needs_devices(spec):
        devices = {d.path: d for d in (*DEFAULT_DEVICES, *linux.devices)}
        before += [
            ops.MakeNode(destination(d.path), d.type, d.major, d.minor, d.file_mode, d.uid, d.gid) for d in devices.values()
        ]
        before += [ops.Symlink(target, path) for target, path in DEV_LINKS]
        before.append(ops.Symlink("pts/ptmx", "/dev/ptmx"))
    after: list[ops.Op] = [ops.PivotRoot()]
    if linux.rootfs_propagation:
        after.append(ops.SetPropagation(mount_options.PROPAGATION[linux.rootfs_propagation]))
    after += read_only_later
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
    for number, mount in enumerate(spec.mounts):
        op = _mount(spec, mount, bundle, number, detach=False)
        if isinstance(op, ops.Mount) and op.flags & const.MS_BIND:
            found[op.destination] = op.source
    return found


def _mount(spec: Spec, mount: Mount, bundle: str, number: int, detach: bool) -> ops.Op:
    options = mount_options.parse(mount.options)
    path = destination(mount.destination)
    data = options.data
    if mount.type == "cgroup":
        return ops.MountCgroup(path, options.flags, data, spec.linux.namespace("cgroup") is not None)
    flags, source = options.flags, mount.source
    if mount.type in ("bind", "rbind"):
        flags |= const.MS_BIND | (const.MS_REC if mount.type == "rbind" else 0)
    idmap = None
    if flags & const.MS_BIND:
        source = posixpath.join(bundle, source)
        if options.idmap or mount.uid_mappings:
            uids, gids = (mount.uid_mappings, mount.gid_mappings) if mount.uid_mappings else _container_ids(spec)
            idmap = ops.IdMap(options.idmap == "ridmap", uids, gids)
    elif spec.linux.mount_label and mount.type in ("tmpfs", "devpts", "mqueue", "overlay"):
        data = ",".join(filter(None, (data, f'context="{spec.linux.mount_label}"')))
    return ops.Mount(
        source=source,
        destination=path,
        fstype=mount.type,
        flags=flags,
        data=data,
        propagation=options.propagation,
        cleared=options.cleared,
        recursive_set=options.recursive_set,
        recursive_clear=options.recursive_clear,
        copy_up=options.copy_up,
        idmap=idmap,
        tree=number if flags & const.MS_BIND and (detach or idmap) else None,
    )


def _container_ids(spec: Spec) -> tuple[tuple[IdMapping, ...], tuple[IdMapping, ...]]:
    return spec.linux.uid_mappings, spec.linux.gid_mappings
