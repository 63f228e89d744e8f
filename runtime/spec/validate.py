"""What the members of a document must have to do with each other. Pure."""

from __future__ import annotations

import posixpath
from typing import Any

from runtime.linux.const import CLOCKS, NAMESPACES
from runtime.spec import mount_options
from runtime.spec.config import IdMapping, Process, Spec

RLIMITS = frozenset(
    f"RLIMIT_{n}"
    for n in (
        "AS", "CORE", "CPU", "DATA", "FSIZE", "LOCKS", "MEMLOCK", "MSGQUEUE", "NICE", "NOFILE", "NPROC", "RSS", "RTPRIO",
        "RTTIME", "SIGPENDING", "STACK",
    )
)  # fmt: skip

# Parameters that belong to a namespace, by the namespace's type: others would change the host.
_IPC_SYSCTLS = frozenset(
    f"kernel.{n}" for n in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
)

# The kernel silently cuts off what is longer.
_MOUNT_DATA_BYTES = 4096


def check(spec: Spec, document: Any) -> list[str]:
    """Return the violations, each with its JSON pointer."""
    problems: list[str] = []
    major = spec.oci_version.partition(".")[0]
    if spec.oci_version and major != "1":
        problems.append(f"/ociVersion: {spec.oci_version!r} is not a version 1 of the specification")
    linux = document.get("linux") if isinstance(document, dict) else None
    if isinstance(linux, dict) and linux.get("intelRdt"):
        problems.append("/linux/intelRdt: is not supported: this runtime has no support for the kernel's resctrl")
    problems += _namespaces(spec) + _mounts(spec) + _names(spec) + _hooks(spec)
    if spec.process:
        problems += check_process(spec.process)
        if spec.process.user.additional_gids and spec.linux.makes("user") and not spec.linux.gid_mappings:
            problems.append("/process/user/additionalGids: need /linux/gidMappings")
    return problems


def _namespaces(spec: Spec) -> list[str]:
    problems = []
    linux = spec.linux
    seen: set[str] = set()
    for i, namespace in enumerate(linux.namespaces):
        at = f"/linux/namespaces/{i}"
        if namespace.type not in NAMESPACES:
            problems.append(f"{at}/type: {namespace.type!r} is no namespace type")
        elif namespace.type in seen:
            problems.append(f"{at}/type: {namespace.type!r} is listed twice")
        if namespace.path and not namespace.path.startswith("/"):
            problems.append(f"{at}/path: {namespace.path!r} must be absolute")
        if namespace.type == "mount" and namespace.path:
            problems.append(f"{at}/path: a mount namespace cannot be joined: /root, /mounts and masks would have no effect")
        seen.add(namespace.type)
    if "mount" not in seen:
        problems.append("/linux/namespaces: a container needs a mount namespace of its own")
    for name, mappings in (("uidMappings", linux.uid_mappings), ("gidMappings", linux.gid_mappings)):
        problems += _overlaps(f"/linux/{name}", mappings)
        if mappings and "user" not in seen:
            problems.append(f"/linux/{name}: need a user namespace in /linux/namespaces")
        elif not mappings and linux.makes("user"):
            problems.append(f"/linux/{name}: a new user namespace needs a mapping")
    if linux.time_offsets and not linux.makes("time"):
        problems.append("/linux/timeOffsets: need a new time namespace in /linux/namespaces")
    problems += [f"/linux/timeOffsets/{c}: is no clock of a time namespace" for c in linux.time_offsets if c not in CLOCKS]
    if linux.rootfs_propagation and linux.rootfs_propagation not in mount_options.PROPAGATION:
        problems.append(f"/linux/rootfsPropagation: {linux.rootfs_propagation!r} is no propagation mode")
    return problems


def _overlaps(at: str, mappings: tuple[IdMapping, ...]) -> list[str]:
    problems = []
    for i, a in enumerate(mappings):
        for b in mappings[:i]:
            if a.container_id < b.container_id + b.size and b.container_id < a.container_id + a.size:
                problems.append(f"{at}/{i}: its container ids overlap another mapping's")
            if a.host_id < b.host_id + b.size and b.host_id < a.host_id + a.size:
                problems.append(f"{at}/{i}: its host ids overlap another mapping's")
    return problems


def _mounts(spec: Spec) -> list[str]:
    problems = []
    for i, mount in enumerate(spec.mounts):
        at = f"/mounts/{i}"
        options = mount_options.parse(mount.options)
        if posixpath.normpath("/" + mount.destination) in ("/", "//"):
            problems.append(f"{at}/destination: must be a path below the root")
        bind = options.bind or mount.type in ("bind", "rbind")
        if not bind and not mount.type:
            problems.append(f"{at}/type: is required where the mount is no bind mount")
        if bind and not mount.source:
            problems.append(f"{at}/source: is required for a bind mount")
        if len(options.data.encode()) >= _MOUNT_DATA_BYTES:
            problems.append(f"{at}/options: are longer than the {_MOUNT_DATA_BYTES - 1} bytes that the kernel reads")
        if options.copy_up and mount.type != "tmpfs":
            problems.append(f"{at}/options: tmpcopyup needs a tmpfs")
        if bool(mount.uid_mappings) != bool(mount.gid_mappings):
            problems.append(f"{at}: needs both uidMappings and gidMappings, or neither")
        mapped = options.idmap or mount.uid_mappings
        if mapped and not bind:
            problems.append(f"{at}/options: only a bind mount can be id-mapped")
        if mapped and not mount.uid_mappings and not spec.linux.uid_mappings:
            problems.append(f"{at}/options: an id-mapped mount needs mappings, its own or the container's")
        problems += _overlaps(f"{at}/uidMappings", mount.uid_mappings) + _overlaps(f"{at}/gidMappings", mount.gid_mappings)
    for i, device in enumerate(spec.linux.devices):
        if not device.path.startswith("/"):
            problems.append(f"/linux/devices/{i}/path: {device.path!r} must be absolute")
    return problems


def _names(spec: Spec) -> list[str]:
    problems = []
    for name, value in (("hostname", spec.hostname), ("domainname", spec.domainname)):
        if value and not spec.linux.namespace("uts"):
            problems.append(f"/{name}: needs a uts namespace in /linux/namespaces")
        if value and len(value.encode()) > 64:
            problems.append(f"/{name}: is longer than 64 bytes")
    for name in spec.linux.sysctl:
        words = _sysctl(spec, name)
        if words:
            problems.append(f"/linux/sysctl/{name.replace('~', '~0').replace('/', '~1')}: {words}")
    return problems


def sysctl_namespace(name: str) -> str | None:
    """Return the type of the namespace that a parameter belongs to; None for one that is the whole host's."""
    key = name.replace("/", ".") if "/" in name and "." not in name else name
    if key in _IPC_SYSCTLS or key.startswith("fs.mqueue."):
        return "ipc"
    if key.startswith("net."):
        return "network"
    return "uts" if key in ("kernel.domainname", "kernel.hostname") else None


def _sysctl(spec: Spec, name: str) -> str:
    if ".." in name.split("/") or name.startswith("/"):
        return "is no name of a parameter"
    needed = sysctl_namespace(name)
    if needed is None:
        return "is not a parameter of a namespace, and would change the host"
    return "" if spec.linux.namespace(needed) else f"needs a {needed} namespace of the container's own"


def _hooks(spec: Spec) -> list[str]:
    return [
        f"/hooks/{name}/{i}/path: {hook.path!r} must be absolute"
        for name, hooks in spec.hooks.items()
        for i, hook in enumerate(hooks)
        if not hook.path.startswith("/")
    ]


def check_process(process: Process) -> list[str]:
    """Return the violations of a process document."""
    problems = []
    if not process.cwd.startswith("/"):
        problems.append(f"/process/cwd: {process.cwd!r} must be absolute")
    seen: set[str] = set()
    for i, rlimit in enumerate(process.rlimits):
        if rlimit.type not in RLIMITS:
            problems.append(f"/process/rlimits/{i}/type: {rlimit.type!r} is no resource limit")
        if rlimit.type in seen:
            problems.append(f"/process/rlimits/{i}/type: {rlimit.type!r} is listed twice")
        if 0 <= rlimit.hard < rlimit.soft:
            problems.append(f"/process/rlimits/{i}/soft: {rlimit.soft} is above the hard limit {rlimit.hard}")
        seen.add(rlimit.type)
    for name, cpus in zip(("initial", "final"), process.exec_cpu_affinity, strict=True):
        try:
            cpu_set(cpus or "0")
        except ValueError:
            problems.append(f"/process/execCPUAffinity/{name}: {cpus!r} is no list of processors")
    return problems


def cpu_set(text: str) -> set[int]:
    """Read a list of processors such as `0-3,7`. Raises: ValueError."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        low = int(first)
        high = int(last) if dash else low
        if not 0 <= low <= high < 65536:
            raise ValueError(part)
        found.update(range(low, high + 1))
    return found
