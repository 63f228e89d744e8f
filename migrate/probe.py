"""Look at this host and its containers: the facts that preflight decides on. Reads only."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from migrate import __version__, cni, command, layer_store, layers, locks, mounts, netns, places, processes, records, volume
from migrate.errors import MigrateError, RuntimeFailed
from migrate.facts import TOOLS, BundleFacts, ContainerFacts, HostFacts, Needs
from migrate.network import Network, name_of
from migrate.overlay import Overlay
from migrate.volume import Policy, Volume
from migrate.warm import available_bytes

_LOOKS = 3
_TOOLS_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_CONTROLLERS = {
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "blkio",
    "pids",
    "hugetlb",
    "net_cls",
    "net_prio",
    "rdma",
}
# What /proc/filesystems does not name, or what CRIU makes by itself.
_NO_FILESYSTEM = {"bind", "rbind", "none", "cgroup", "cgroup2", "proc", "sysfs", "devpts", "mqueue", "tmpfs", "devtmpfs"}


def host_facts(bundle: str | None, container: str | None, cpu: str | None, needed: dict[str, Any]) -> HostFacts:
    """Return what is to know of this host, for a container that may come here from one with that processor.

    Raises: MigrateError; TypeError, ValueError, AttributeError for what is no Needs.
    """
    needs = Needs.from_json(needed)
    runtime_error, own_cpu, cpu_error = "", "", ""
    annotations: dict[str, str] = {}
    try:
        annotations = json.loads(command.run("features"))["annotations"]
        if "org.criu.error" not in annotations:
            own_cpu, cpu_error = _cpu(cpu)
    except MigrateError as e:
        runtime_error = str(e)
    exists = None
    if container is not None and not runtime_error:
        exists = command.state(container) is not None
    layout, controllers = _cgroups()
    return HostFacts(
        hostname=platform.node(),
        boot_id=locks.boot_id(),
        machine=platform.machine(),
        kernel=platform.release(),
        version=__version__,
        uid=os.geteuid(),
        runtime_error=runtime_error,
        criu_version=annotations.get("org.criu.version", ""),
        criu_error=annotations.get("org.criu.error", ""),
        criu_features=tuple(f for f in annotations.get("org.criu.features", "").split(",") if f),
        cpu=own_cpu,
        cpu_error=cpu_error,
        container_exists=bool(exists),
        bundle_exists=bundle is not None and os.path.lexists(bundle),
        images_free_bytes=_free(places.RUN),
        bundle_free_bytes=_free(Path(bundle)) if bundle else 0,
        bundle_free_inodes=_free_inodes(Path(bundle)) if bundle else 0,
        images_on=mounts.filesystem(_existing(places.RUN)),
        memory_free_bytes=available_bytes(),
        cgroup=layout,
        controllers=controllers,
        lsm=_lsm(),
        tools=tuple(t for t in TOOLS if shutil.which(t, path=_TOOLS_PATH)),
        missing_bind_sources=tuple(s for s in needs.bind_sources if not os.path.exists(s)),
        existing_volumes=tuple(path for _, path in _sizes(needs) if os.path.lexists(path)),
        full_volumes=tuple(path for size, path in _sizes(needs) if _free(Path(path)) < size),
        missing_filesystems=tuple(f for f in needs.filesystems if f not in _filesystems()),
        ports_in_use=tuple(p for p in needs.ports if p in _listening()),
        follows_memory=annotations.get("ferry.follows-memory") == "true",
        fixed_downtime_ms=records.fixed_downtime_ms(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        bridges=netns.bridges() if needs.network else (),
        addresses=netns.own_addresses() if needs.network else (),
        network_exists=bool(needs.network) and netns.exists(needs.network),
        cni=tuple(cni.usable()) if needs.network else (),
        layers=layer_store.have(needs.layers),
        clock_ns=time.time_ns(),
    )


def _cgroups() -> tuple[str, tuple[str, ...]]:
    """Return how cgroups are mounted here, and the controllers that there are."""
    v1 = {name for m in mounts.all_mounts() if m.kind == "cgroup" for name in m.options.split(",")}
    v2 = [m.point for m in mounts.all_mounts() if m.kind == "cgroup2"]
    found = v1 & _CONTROLLERS
    for point in v2:
        with contextlib.suppress(OSError):
            found |= set((Path(point) / "cgroup.controllers").read_text().split())
    layout = ("hybrid" if v2 else "v1") if v1 & _CONTROLLERS else "v2"
    return layout, tuple(sorted(found))


def _lsm() -> tuple[str, ...]:
    """Return the security modules that are on and label processes."""
    found = []
    with contextlib.suppress(OSError):
        if Path("/sys/module/apparmor/parameters/enabled").read_text().strip() == "Y":
            found.append("apparmor")
    if Path("/sys/fs/selinux/enforce").exists():
        found.append("selinux")
    return tuple(found)


@cache
def _filesystems() -> frozenset[str]:
    return frozenset(line.split("\t")[-1] for line in Path("/proc/filesystems").read_text().splitlines())


def _sockets(process: str = "self") -> Iterator[tuple[str, str]]:
    """Yield ("tcp ADDRESS:PORT", inode) of what listens in a process's network namespace, addresses as the kernel writes them."""
    for name, states in (("tcp", {"0A"}), ("tcp6", {"0A"}), ("udp", {"07"}), ("udp6", {"07"})):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] in states:
                    yield f"{name} {fields[1]}", fields[9]


@cache
def _listening() -> frozenset[str]:
    return frozenset(port for port, _ in _sockets())


def _ports(pids: list[int]) -> tuple[str, ...]:
    """Return what these processes listen on in this host's own network."""
    own = os.readlink("/proc/self/ns/net")
    inodes: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/net") != own:
                continue
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    link = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if link.startswith("socket:["):
                        inodes.add(link[8:-1])
    return tuple(sorted(port for port, inode in _sockets() if inode in inodes)) if inodes else ()


def _users(bundle: Path, inside: set[int]) -> tuple[str, ...]:
    """Return the processes that are not in the container and have files of its bundle open, or are in its directories."""
    prefix = os.path.realpath(bundle) + "/"
    found = []
    own_namespace = os.readlink("/proc/self/ns/mnt")
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) in inside:
            continue
        with contextlib.suppress(OSError):
            if os.readlink(entry / "ns/mnt") != own_namespace:
                continue  # the same path is another file there
            links = [entry / "cwd", entry / "root", entry / "exe", *(entry / "fd").iterdir()]
            if any(_leads_below(link, prefix) for link in links):
                found.append(f"{entry.name} ({(entry / 'comm').read_text().strip()})")
    return tuple(found[:20])


def _leads_below(link: Path, prefix: str) -> bool:
    try:
        return (os.readlink(link) + "/").startswith(prefix)
    except OSError:
        return False


def _cpu(other: str | None) -> tuple[str, str]:
    """Return this host's processor, or what it lacks of another's; "" where CRIU cannot tell, as on arm64."""
    try:
        if not other:
            return command.run("cpu", "dump"), ""
    except RuntimeFailed:
        return "", ""
    try:
        command.run("cpu", "check", given=other)
    except RuntimeFailed as e:
        return "", e.message.splitlines()[-1].strip()
    return "", ""


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _free_inodes(path: Path) -> int:
    return os.statvfs(_existing(path)).f_favail


def _sizes(needs: Needs) -> list[tuple[int, str]]:
    """Return the volumes that are to be copied: bytes, path. Raises: ValueError."""
    return [(int(size), path) for size, _, path in (v.partition(" ") for v in needs.volumes)]


def container_facts(container: str, flags: list[str], wanted: dict[str, str]) -> ContainerFacts | None:
    """Return what is to know of a container of this host that would be checkpointed with these flags; None where there is none.

    `wanted` is what is to be done with its volumes, as migrate.volume has it. Raises: MigrateError; ValueError.
    """
    everything = list_containers()
    document = next((c for c in everything if c["id"] == container), None)
    if document is None:
        return None
    pids = [int(process.name) for process in processes.family(document["pid"])] if document["status"] != "stopped" else []
    bundle = Path(document["bundle"])
    config = _config(bundle)
    volumes, unknown = volume.choose(binds(config, bundle), wanted, str(bundle))
    others = [c for c in everything if c["id"] != container]
    volumes = [_look_at_volume(v, others, set(pids)) if v.policy == Policy.COPY else v for v in volumes]
    files = bundle_facts(bundle, Path(document["rootfs"]), set(pids))
    return ContainerFacts(
        id=container,
        status=document["status"],
        pid=document["pid"],
        memory_bytes=sum(processes.resident_bytes(pid) for pid in pids),
        shared_bytes=processes.shared_bytes(pids),
        bundle=files,
        moved_by=_moved_by(container),
        unfinished=next((r.migration_id for r in records.unfinished() if r.container == container and r.role == "source"), ""),
        needs=_needs(config, bundle, pids, volumes, files.overlay),
        findings=tuple(command.check(container, flags)) if document["status"] == "running" else (),
        sharers=tuple(c["id"] for c in others if _overlap(c, document)),
        network=_network(config, document["pid"]),
        volumes=tuple(volumes),
        unknown_volumes=tuple(unknown),
    )


def _look_at_volume(found: Volume, others: list[dict[str, Any]], inside: set[int]) -> Volume:
    """Return a volume that is to be copied with what is to know of it; `inside` are the container's processes."""
    root = Path(found.source)
    if not root.is_dir() or os.path.ismount(root) or os.path.realpath(root) != found.source:
        return replace(found, is_plain=False)
    sharers = []
    for other in others:
        bundle = Path(other["bundle"])
        paths = [str(bundle), str(other["rootfs"])]
        with contextlib.suppress(MigrateError):
            paths += [source for _, source in binds(_config(bundle), bundle)]
        real = [os.path.realpath(p) for p in paths]
        if any(volume.is_inside(p, found.source) or volume.is_inside(found.source, p) for p in real):
            sharers.append(str(other["id"]))
    return replace(
        found,
        size_bytes=_measure(root)[1],
        mounts_inside=tuple(mounts.below(root)),
        sharers=tuple(sharers),
        users=_users(root, inside),
    )


def binds(config: dict[str, Any], bundle: Path) -> list[tuple[str, str]]:
    """Return what of the host is mounted into a container: (destination, source)."""
    found = [m for m in config.get("mounts") or () if _is_bind(m)]
    return [(str(m["destination"]), os.path.normpath(os.path.join(bundle, m["source"]))) for m in found]


def bind_sources(bundle: str) -> set[str]:
    """Return what of the host is mounted into a bundle's container. Raises: MigrateError."""
    return {source for _, source in binds(_config(Path(bundle)), Path(bundle))}


def network_name(bundle: str) -> str | None:
    """Return the name of the network namespace that a bundle's container joins, None for none. Raises: MigrateError."""
    return _network_name(_config(Path(bundle)))


def _network_name(config: dict[str, Any]) -> str | None:
    """Return the name of the network namespace that a container joins; None where it is not one that moves along."""
    namespaces = (config.get("linux") or {}).get("namespaces") or ()
    return next((name_of(n["path"]) for n in namespaces if n["type"] == "network" and n.get("path")), None)


def _network(config: dict[str, Any], init_pid: int) -> Network | None:
    name = _network_name(config)
    if name is None:
        return None
    found = netns.describe(name, (config.get("linux") or {}).get("sysctl") or {})
    sharers: set[str] = set(netns.users(name))
    for _ in range(_LOOKS):
        # After it, so that no child of it is taken for another's; and again, for those that end before they are looked up.
        inside = {process.name for process in processes.family(init_pid)}
        sharers = {u for u in sharers if u.split()[0] not in inside} & set(netns.users(name))
        if not sharers:
            break
    return replace(found, sharers=tuple(sorted(sharers)))


def _moved_by(container: str) -> str:
    """Return the id of the move that holds a container's lock, "" when none does."""
    holder = locks.holder(container)
    return "" if holder is None else str(holder.get("migration") or "another move")


def list_containers() -> list[dict[str, Any]]:
    """Return the state documents of this host's containers. Raises: RuntimeFailed."""
    return json.loads(command.run("list", "--format", "json")) or []


def _config(bundle: Path) -> dict[str, Any]:
    """Return a bundle's configuration. Raises: MigrateError."""
    try:
        document: dict[str, Any] = json.loads((bundle / "config.json").read_bytes())
    except (OSError, ValueError) as e:
        raise MigrateError(f"cannot read {bundle / 'config.json'}: {e}") from e
    return document


def _is_bind(mount: dict[str, Any]) -> bool:
    return mount.get("type") in ("bind", "rbind") or bool({"bind", "rbind"} & set(mount.get("options") or ()))


def _needs(config: dict[str, Any], bundle: Path, pids: list[int], volumes: list[Volume], overlay: Overlay | None) -> Needs:
    copied = {v.source: v.size_bytes for v in volumes if v.policy == Policy.COPY}
    there = [s for _, s in binds(config, bundle) if not any(volume.is_inside(s, moved) for moved in (*copied, str(bundle)))]
    linux = config.get("linux") or {}
    process = config.get("process") or {}
    resources = linux.get("resources") or {}
    namespaces = {n["type"] for n in linux.get("namespaces") or ()}
    kinds = {m.get("type") or "" for m in config.get("mounts") or () if not _is_bind(m)} - _NO_FILESYSTEM - {""}
    kinds |= {"overlay"} if overlay else set()
    limits = {"memory": "memory", "cpu": "cpu", "pids": "pids", "blockIO": "io", "hugepageLimits": "hugetlb", "rdma": "rdma"}
    controllers = {name for key, name in limits.items() if resources.get(key)}
    if (resources.get("cpu") or {}).keys() & {"cpus", "mems"}:
        controllers.add("cpuset")
    labels = {"apparmor": "apparmorProfile", "selinux": "selinuxLabel"}
    return Needs(
        bind_sources=tuple(there),
        volumes=tuple(f"{size} {source}" for source, size in copied.items()),
        filesystems=tuple(sorted(kinds)),
        ports=_ports(pids) if "network" not in namespaces else (),
        controllers=tuple(sorted(controllers)),
        lsm=tuple(name for name, key in labels.items() if process.get(key)),
        network_lock="network" not in namespaces
        or any(n.get("path") for n in linux.get("namespaces") or () if n["type"] == "network"),
        network=_network_name(config) or "",
        layers=overlay.digests if overlay else (),
    )


def bundle_facts(bundle: Path, rootfs: Path, inside: set[int]) -> BundleFacts:
    """Return what is to know of a bundle's files, which the processes `inside` use. Raises: MigrateError."""
    document = _config(bundle)
    namespaces = [n for n in (document.get("linux") or {}).get("namespaces") or () if n.get("path")]
    overlay = layers.at(rootfs)
    overlay = overlay and layers.looked_at(overlay)
    entries, size = _measure(Path(overlay.upper) if overlay and overlay.upper else rootfs)
    return BundleFacts(
        path=str(bundle),
        rootfs=str(rootfs),
        rootfs_is_mount=os.path.ismount(rootfs),
        mounts_inside=tuple(m for m in mounts.below(bundle) if m != str(rootfs)),
        entries=entries,
        size_bytes=size,
        bind_sources=tuple(s for _, s in binds(document, bundle) if not volume.is_inside(s, str(bundle))),
        namespace_paths=tuple(n["path"] for n in namespaces if n["type"] != "network" or name_of(n["path"]) is None),
        users=_users(bundle, inside),
        overlay=overlay,
    )


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether the files of one container are, or lie in, those of the other."""
    pairs = [(a[x], b[y]) for a, b in ((one, other), (other, one)) for x in ("bundle", "rootfs") for y in ("bundle", "rootfs")]
    return any(a == b or str(a).startswith(f"{b}/") for a, b in pairs)


def _measure(root: Path) -> tuple[int, int]:
    entries, size = 0, 0
    seen: set[tuple[int, int]] = set()
    for base, directories, files in os.walk(root):
        for name in (*directories, *files):
            try:
                st = os.lstat(os.path.join(base, name))
            except OSError:
                continue
            entries += 1
            if stat.S_ISREG(st.st_mode) and (st.st_dev, st.st_ino) not in seen:
                seen.add((st.st_dev, st.st_ino))
                size += st.st_blocks * 512
    return entries, size
