"""What was seen of two hosts and a container, as values that cross the wire as JSON. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class HostFacts:
    """One host. Units: bytes; nanoseconds since the epoch."""

    hostname: str
    boot_id: str
    machine: str
    kernel: str
    version: str
    uid: int
    runtime_error: str
    criu_version: str
    criu_error: str
    cpu: str  # as `runtime cpu dump` writes it
    cpu_error: str  # what it lacks of the source's
    container_exists: bool
    bundle_exists: bool
    images_free_bytes: int
    bundle_free_bytes: int
    bundle_free_inodes: int
    missing_bind_sources: tuple[str, ...]
    clock_ns: int


@dataclass(frozen=True, slots=True)
class BundleFacts:
    path: str
    rootfs: str
    rootfs_is_mount: bool
    mounts_inside: tuple[str, ...]
    entries: int
    size_bytes: int
    bind_sources: tuple[str, ...]
    namespace_paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    id: str
    status: str
    pid: int
    memory_bytes: int
    bundle: BundleFacts
    moved_by: str  # id of the move that has it now, or ""
    findings: tuple[dict[str, str], ...]  # of `runtime checkpoint --check`: code, severity, words, remedy
    sharers: tuple[str, ...]  # other containers that use the same bundle or rootfs


def to_json(facts: HostFacts | ContainerFacts) -> dict[str, Any]:
    return asdict(facts)


def host_from_json(document: dict[str, Any]) -> HostFacts:
    """Read what a host's agent sent. Raises: KeyError, TypeError for what is no HostFacts."""
    return HostFacts(**_tuples(HostFacts, document))


def container_from_json(document: dict[str, Any]) -> ContainerFacts:
    """Read what a host's agent sent. Raises: KeyError, TypeError for what is no ContainerFacts."""
    bundle = BundleFacts(**_tuples(BundleFacts, document["bundle"]))
    return ContainerFacts(**_tuples(ContainerFacts, {**document, "bundle": bundle}))


def _tuples(kind: type, document: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in document.items() if k in names}
