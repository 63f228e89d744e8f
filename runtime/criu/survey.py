"""What a dump must be told of a container, and all that `checkpoint --check` looks at."""

from __future__ import annotations

import os
import shutil
import stat

from runtime.container.bundle import Bundle
from runtime.container.container import Container
from runtime.criu import configfiles, features, mounts, network, scan
from runtime.criu.findings import TTY_MAJORS, Look
from runtime.criu.options import CheckpointOptions
from runtime.criu.request import ContainerFacts
from runtime.linux import namespace
from runtime.linux.capability import permitted_set
from runtime.linux.const import NAMESPACES
from runtime.linux.procfs import read, read_mountinfo


def facts(container: Container, options: CheckpointOptions, *, rebuild_network: bool) -> tuple[ContainerFacts, tuple[str, ...]]:
    """Gather what a dump must know; also the names of the first process's descriptors as the image will have them.

    `rebuild_network` allows a network namespace that holds nothing of its own to be left out of the images: a
    restore by this runtime makes an equal one faster than CRIU dumps and restores it.
    """
    pid = container.state.pid
    bundle = container.bundle()
    names = _descriptors(pid)
    namespaces = []
    for kind in network.NAMESPACE_KEY:
        n = bundle.spec.linux.namespace(kind)
        if n is not None and n.path:
            namespaces.append(f"{NAMESPACES[kind][1]}[{_namespace(pid, kind)}]:{network.NAMESPACE_KEY[kind]}")
    only_loopback = _only_loopback(pid)
    rebuild = rebuild_network and only_loopback and network.can_rebuild(bundle.spec)
    if rebuild:
        namespaces.append(f"net[{_namespace(pid, 'network')}]:{network.NAMESPACE_KEY['network']}")
    pids = container.manager().pids()
    found = ContainerFacts(
        pid=pid,
        rootfs=container.state.rootfs,
        binds=_binds(container, bundle),
        external_namespaces=tuple(namespaces),
        external_files=tuple(sorted({n for n in names if n.startswith("file[")})),
        freezer_path=container.manager().freezer_path,
        ghost_bytes=2 * scan.ghost_bytes(pids),  # they may grow until the processes stand still
        only_loopback=only_loopback,
        rebuild_network=rebuild,
        has_nft=_has("nft"),
        has_iptables=_has("iptables-restore"),
        parent_image=None if options.parent_path is None else os.path.relpath(options.parent_path, options.image_path),
    )
    return found, names


def look(container: Container, options: CheckpointOptions) -> Look:
    """Look at everything that could be in the way of a checkpoint. Raises: ContainerError, OSError."""
    pid = container.state.pid
    bundle = container.bundle()
    members = scan.family(pid, container.manager().pids())
    pids = [p for p, _ in members]
    places = _binds(container, bundle)
    mounted = tuple(read_mountinfo(pid))
    found = features.examine()
    directory = options.image_path
    while not directory.exists():
        directory = directory.parent
    return Look(
        pid=pid,
        tasks=tuple(scan.tasks(members)),
        files=tuple(f for p in pids for f in scan.files(p)),
        sockets=tuple(scan.sockets(pids)),
        mounts=mounted,
        message_queues=tuple(scan.message_queues(pid, [m.mount_point for m in mounted if m.fstype == "mqueue"])),
        known_places=(*places, *(f"{p}/" for p in places)),
        inherited=_descriptors(pid)[:3],
        own_pid_namespace=_own(bundle, "pid"),
        own_ipc_namespace=_own(bundle, "ipc"),
        joined_namespaces=tuple(n.type for n in bundle.spec.linux.namespaces if n.path),
        foreign_namespaces=_foreign(pid),
        own_terminal=bool(bundle.spec.process and bundle.spec.process.terminal),
        needs_lock=not _only_loopback(pid),
        has_nft=_has("nft"),
        has_iptables=_has("iptables-restore"),
        memory_bytes=sum(_resident(p) for p in pids),
        images_free_bytes=shutil.disk_usage(directory).free,
        images_place=str(options.image_path),
        has_sys_resource="CAP_SYS_RESOURCE" in permitted_set(),
        tracks_memory=features.tracks_memory() if "org.criu.error" not in found else False,
        criu_error=found.get("org.criu.error", ""),
        criu_version=found.get("org.criu.version", ""),
        overridden=configfiles.overridden(options.config_file),
    )


def _foreign(pid: int) -> tuple[str, ...]:
    """Return the namespaces of a process that belong to another user namespace than its own."""
    users = _namespace(pid, "user")
    if users == os.stat("/proc/self/ns/user").st_ino:
        return ()
    others = {kind: file for kind, (_, file) in NAMESPACES.items() if kind not in ("user", "cgroup", "time")}
    return tuple(kind for kind, file in others.items() if namespace.owner(f"/proc/{pid}/ns/{file}") != users)


def _binds(container: Container, bundle: Bundle) -> dict[str, str]:
    found = mounts.external(bundle.spec, str(bundle.path), container.manager())
    return mounts.without_masked_directories(found, bundle.spec, read_mountinfo(container.state.pid))


def _own(bundle: Bundle, kind: str) -> bool:
    return bundle.spec.linux.namespace(kind) is not None


def _namespace(pid: int, kind: str) -> int:
    return os.stat(f"/proc/{pid}/ns/{NAMESPACES[kind][1]}").st_ino


def _resident(pid: int) -> int:
    try:
        return int(read(f"/proc/{pid}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _has(command: str) -> bool:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


def _only_loopback(pid: int) -> bool:
    if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
        return False
    lines = read(f"/proc/{pid}/net/dev").splitlines()[2:]
    return {line.split(":")[0].strip() for line in lines} <= {"lo"}


def _descriptors(pid: int) -> tuple[str, ...]:
    """Name the first process's descriptors from 0 on; "" for one that is not there."""
    numbers = {int(n) for n in os.listdir(f"/proc/{pid}/fd")}
    inside = {m.mount_id for m in read_mountinfo(pid)}
    return tuple(_name(pid, n, inside) if n in numbers else "" for n in range(max([2, *numbers]) + 1))


def _name(pid: int, number: int, inside: set[int]) -> str:
    """Name a descriptor as CRIU does: a pipe or socket by itself, a file or terminal outside the container by what it is."""
    path = f"/proc/{pid}/fd/{number}"
    try:
        target, found = os.readlink(path), os.stat(path)
        lines = read(f"/proc/{pid}/fdinfo/{number}").splitlines()
    except OSError:
        return ""
    # A null device is a file to CRIU: a restored container has the host's own where it was given that for a pipe.
    is_null = stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)
    is_terminal = stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) in TTY_MAJORS
    if not stat.S_ISREG(found.st_mode) and not is_null and not is_terminal:
        return target
    mount_id = next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
    if mount_id in inside or target.startswith("/memfd:"):
        return target
    return f"tty[{found.st_rdev:x}:{found.st_dev:x}]" if is_terminal else f"file[{mount_id:x}:{found.st_ino:x}]"
