"""What was seen of two hosts and a container, as values that cross the wire as JSON. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from migrate.network import Network
from migrate.overlay import Overlay
from migrate.volume import Volume


@dataclass(frozen=True, slots=True)
class HostFacts:
    """One host. Units: bytes; nanoseconds: an agent sends its clock since the epoch, a coordinator keeps how far it is ahead."""

    hostname: str
    boot_id: str
    machine: str
    kernel: str
    version: str
    uid: int
    runtime_error: str
    criu_version: str
    criu_error: str
    criu_features: tuple[str, ...]  # of those that CRIU is asked for: mem_track, lazy_pages, pidfd_store
    cpu: str  # as `runtime cpu dump` writes it
    cpu_error: str  # what it lacks of the source's
    container_exists: bool
    bundle_exists: bool
    images_free_bytes: int
    bundle_free_bytes: int
    bundle_free_inodes: int
    images_on: str  # file system that the images would be on
    memory_free_bytes: int
    cgroup: str  # v1, v2, hybrid
    controllers: tuple[str, ...]
    lsm: tuple[str, ...]  # apparmor, selinux
    tools: tuple[str, ...]  # of those that a move may need
    missing_bind_sources: tuple[str, ...]
    existing_volumes: tuple[str, ...]  # of those that are to be copied to it
    full_volumes: tuple[str, ...]  # of these, those that it has no space for
    missing_filesystems: tuple[str, ...]
    ports_in_use: tuple[str, ...]  # of those that the container listens on
    clock_ns: int
    follows_memory: bool  # `runtime checkpoint --memory-fd` is there
    open_files: int  # how many descriptors a process may have
    bridges: tuple[str, ...]  # that an interface of a container can be a port of
    addresses: tuple[str, ...]  # its own
    fixed_downtime_ms: float | None  # what moves from it lately cost, besides what their memory took
    network_exists: bool  # it has a network namespace of the container's name
    cni: tuple[str, ...]  # networks of CNI that it can attach one to
    layers: tuple[str, ...]  # of those that the container's root is made of: their digests


# What the two hosts are looked for: ssh carries the data, and nft or iptables lock the network of a container.
TOOLS = ("ssh", "nft", "iptables-restore")


@dataclass(frozen=True, slots=True)
class Needs:
    """What a container needs of the host that it is on."""

    bind_sources: tuple[str, ...] = ()  # but for what moves along
    volumes: tuple[str, ...] = ()  # that are to be copied to it: "bytes path"
    filesystems: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()  # "tcp 0100007F:0050", as /proc/net writes them; only of the host's own network
    controllers: tuple[str, ...] = ()  # of cgroups, on which it has limits
    lsm: tuple[str, ...] = ()  # security modules that label its processes
    network_lock: bool = False  # others can talk to it
    network: str = ""  # name of the network namespace that is to be made there
    layers: tuple[str, ...] = ()  # digests of those that its root is made of

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Needs:
        """Read what another host sent; what is missing is not needed. Raises: TypeError, ValueError, AttributeError."""
        names = ("bind_sources", "volumes", "filesystems", "ports", "controllers", "lsm", "layers")
        lists = {n: tuple(map(str, document.get(n) or ())) for n in names}
        name = str(document.get("network") or "")
        return cls(**lists, network_lock=bool(document.get("network_lock")), network=name if "/" not in name else "")


@dataclass(frozen=True, slots=True)
class BundleFacts:
    path: str
    rootfs: str
    rootfs_is_mount: bool
    mounts_inside: tuple[str, ...]
    entries: int
    size_bytes: int
    bind_sources: tuple[str, ...]  # outside of the bundle
    namespace_paths: tuple[str, ...]  # of namespaces that are joined, but for the network's that moves along
    users: tuple[str, ...]  # processes outside of the container that have its files open: "pid (name)"
    overlay: Overlay | None = None  # that is mounted at the rootfs; then the rootfs is nothing else


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    id: str
    status: str
    pid: int
    memory_bytes: int
    shared_bytes: int  # of it what processes share, which the target needs once more for a moment
    bundle: BundleFacts
    moved_by: str  # id of the move that has it now, or ""
    unfinished: str  # id of an earlier move of it that is not over, or ""
    needs: Needs
    findings: tuple[dict[str, str], ...]  # of `runtime checkpoint --check`: code, severity, words, remedy
    sharers: tuple[str, ...]  # other containers that use the same bundle or rootfs
    network: Network | None = None  # that it joins by path
    volumes: tuple[Volume, ...] = ()  # that something was said about
    unknown_volumes: tuple[str, ...] = ()  # names that name nothing that is mounted into it


def to_json(facts: HostFacts | ContainerFacts) -> dict[str, Any]:
    return asdict(facts)


def host_from_json(document: dict[str, Any]) -> HostFacts:
    """Read what a host's agent sent. Raises: KeyError, TypeError for what is no HostFacts."""
    return HostFacts(**_tuples(HostFacts, document))


def container_from_json(document: dict[str, Any]) -> ContainerFacts:
    """Read what a host's agent sent. Raises: KeyError, TypeError, ValueError for what is no ContainerFacts."""
    overlay = document["bundle"].get("overlay")
    described = {"overlay": Overlay.from_json(overlay) if overlay else None}
    bundle = BundleFacts(**_tuples(BundleFacts, {**document["bundle"], **described}))
    needs = Needs.from_json(document["needs"])
    network = Network.from_json(document["network"]) if document.get("network") else None
    volumes = tuple(Volume.from_json(v) for v in document["volumes"])
    parts = {"bundle": bundle, "needs": needs, "network": network, "volumes": volumes}
    return ContainerFacts(**_tuples(ContainerFacts, {**document, **parts}))


def _tuples(kind: type, document: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in document.items() if k in names}
