"""What a move will do, decided from the request and the facts. Pure; `--dry-run` prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from migrate.facts import ContainerFacts, HostFacts
from migrate.phase import WORDS, Phase
from migrate.volume import Policy

# Below this a freeze has memory sent as fast as the daemon that fills it in would be started.
PRE_COPY_FROM_BYTES = 32 << 20
# What a freeze takes when nothing is left to send, before a move from here has told: CRIU's dump and restore of a small process.
FIXED_MS = 100.0
# CRIU keeps the memory of what it freezes in pipes of this size.
KEPT_IN_A_PIPE_BYTES, _OTHER_FILES = 1 << 20, 1000


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for. A host is named as for ssh; "-" is the one that the coordinator is on."""

    container: str
    source: str
    target: str
    remote_command: str = "migrate"
    tcp_established: bool = False
    tcp_close: bool = False
    link_remap: bool = False
    ext_unix_sk: bool = False
    shell_job: bool = False
    file_locks: bool = False
    keep_source: bool = False
    pre_copy: str = "auto"  # auto, always, never
    max_downtime_ms: float = 300.0
    on_diverge: str = "switch"  # switch, throttle, lazy, abort
    bandwidth_limit: float = 0.0  # bytes a second while the container runs, 0 is none
    compress: str = "auto"  # auto, zstd, none
    parallel: int = 1  # connections for what is sent in bulk
    volumes: tuple[tuple[str, str], ...] = ()  # name, policy
    ignore: tuple[str, ...] = ()

    @property
    def criu_flags(self) -> list[str]:
        names = ("tcp_established", "tcp_close", "link_remap", "ext_unix_sk", "shell_job", "file_locks")
        return [f"--{n.replace('_', '-')}" for n in names if getattr(self, n)]


@dataclass(frozen=True, slots=True)
class Route:
    """How the hosts of a move find each other. Addresses are those of migrate.host.Address, as seen from the other host."""

    coordinator: str
    source_address: dict[str, Any]
    target_address: dict[str, Any]
    direct: bool  # bulk data goes from the source to the target, not through the coordinator


@dataclass(frozen=True, slots=True)
class Plan:
    migration_id: str
    container: str
    source: str
    target: str
    bundle: str
    files_bytes: int
    memory_bytes: int
    criu_flags: tuple[str, ...]
    keep_source: bool
    remote_command: str
    coordinator: str
    source_address: dict[str, Any]
    target_address: dict[str, Any]
    direct: bool
    pre_copy: bool  # the memory is sent while the container runs
    max_downtime_ms: float
    fixed_downtime_ms: float  # what a freeze costs besides its memory
    on_diverge: str
    bandwidth_limit: float
    compress: str
    parallel: int
    network: dict[str, Any] | None  # that moves along
    volumes: tuple[str, ...]  # directories that do
    shared: tuple[str, ...]  # directories that must be the same on both hosts
    overlay: dict[str, Any] | None  # that the rootfs is, on the source

    @property
    def sending(self) -> dict[str, Any]:
        """How the source sends what is in bulk."""
        return {"compress": self.compress, "bandwidth_limit": self.bandwidth_limit, "parallel": self.parallel}

    def as_dict(self) -> dict[str, Any]:
        phases = [{"phase": str(p), "what": WORDS[p].doing, "downtime": WORDS[p].downtime, "undo": WORDS[p].undo} for p in Phase]
        return {**asdict(self), "phases": phases}


def make(
    request: Request, migration_id: str, source: HostFacts, container: ContainerFacts, target: HostFacts, route: Route
) -> Plan:
    return Plan(
        migration_id=migration_id,
        container=container.id,
        source=source.hostname,
        target=target.hostname,
        bundle=container.bundle.path,
        files_bytes=container.bundle.size_bytes + sum(v.size_bytes for v in container.volumes) + _layers_bytes(container, target),
        memory_bytes=container.memory_bytes,
        criu_flags=tuple(request.criu_flags),
        keep_source=request.keep_source,
        remote_command=request.remote_command,
        pre_copy=_pre_copy(request, source, container, target),
        max_downtime_ms=request.max_downtime_ms,
        fixed_downtime_ms=FIXED_MS if source.fixed_downtime_ms is None else source.fixed_downtime_ms,
        on_diverge=request.on_diverge,
        bandwidth_limit=request.bandwidth_limit,
        compress=request.compress,
        parallel=request.parallel if route.direct else 1,
        network=container.network.as_dict() if container.network else None,
        volumes=tuple(v.source for v in container.volumes if v.policy == Policy.COPY),
        shared=tuple(v.source for v in container.volumes if v.policy == Policy.SHARED),
        overlay=container.bundle.overlay.as_dict() if container.bundle.overlay else None,
        **asdict(route),
    )


def _layers_bytes(container: ContainerFacts, target: HostFacts) -> int:
    overlay = container.bundle.overlay
    return overlay.size_without(target.layers) if overlay else 0


def can_pre_copy(source: HostFacts, container: ContainerFacts, target: HostFacts) -> str:
    """Return why memory cannot be sent while the container runs; "" when it can."""
    if not source.follows_memory:
        return f"the kernel of {source.hostname} cannot follow writes to memory: Linux 6.7 on x86-64 can"
    if "lazy_pages" not in target.criu_features:
        return f"the kernel of {target.hostname} cannot fill memory in while a container runs (userfaultfd)"
    needed = 2 * container.memory_bytes // KEPT_IN_A_PIPE_BYTES + _OTHER_FILES
    if needed > source.open_files:
        return f"a process on {source.hostname} may have {source.open_files} files open (ulimit -Hn), and {needed} are needed"
    return ""


def _pre_copy(request: Request, source: HostFacts, container: ContainerFacts, target: HostFacts) -> bool:
    if request.pre_copy == "never" or can_pre_copy(source, container, target):
        return False
    return request.pre_copy == "always" or container.memory_bytes >= PRE_COPY_FROM_BYTES
