"""What a move will do, decided from the request and the facts. Pure; `--dry-run` prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from migrate.facts import ContainerFacts, HostFacts
from migrate.phase import WORDS, Phase


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
        files_bytes=container.bundle.size_bytes,
        memory_bytes=container.memory_bytes,
        criu_flags=tuple(request.criu_flags),
        keep_source=request.keep_source,
        remote_command=request.remote_command,
        **asdict(route),
    )
