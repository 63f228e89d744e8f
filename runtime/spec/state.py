"""state.json: what the runtime remembers of a container, and the state document that it prints of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from runtime import OCI_VERSION
from runtime.errors import SpecError
from runtime.values import Value, as_dict

VERSION = 1


class State(Value):
    """Everything about a container that is not in its config.json. Units: `start_time` in clock ticks since boot."""

    id: str
    bundle: str
    rootfs: str
    created: str  # RFC 3339, UTC
    owner: str
    pid: int = 0  # 0 until the init process exists
    start_time: int = 0
    cgroup_paths: Mapping[str, str] = MappingProxyType({})  # controller, "" for v2 -> directory
    cgroup_parents: tuple[str, ...] = ()  # directories above those that were made for it
    stdio: tuple[str, str, str] = ("", "", "")  # what fds 0-2 of the container were at its start
    new_keyring: bool = True
    systemd_unit: tuple[str, str] | None = None  # slice and scope, where systemd manages the cgroup


def to_json(state: State) -> dict[str, Any]:
    return {"version": VERSION, **as_dict(state), "cgroup_paths": dict(state.cgroup_paths)}


def from_json(document: Any) -> State:
    """Read what `to_json` wrote. Raises: SpecError."""
    try:
        if document["version"] != VERSION:
            raise SpecError(f"/version: {document['version']} is not {VERSION}")
        fields = {k: v for k, v in document.items() if k != "version"}
        stdio = fields.pop("stdio")
        unit = fields.pop("systemd_unit", None)
        parents = tuple(fields.pop("cgroup_parents", ()))
        return State(
            **fields,
            systemd_unit=(unit[0], unit[1]) if unit else None,
            cgroup_parents=parents,
            stdio=(stdio[0], stdio[1], stdio[2]),
        )
    except (TypeError, KeyError, IndexError) as e:
        raise SpecError(f"state.json is damaged: {e}") from e


def oci_state(state: State, status: str, annotations: dict[str, str]) -> dict[str, Any]:
    """Return the document that hooks read on stdin. Source: OCI runtime specification 1.2, runtime.md, State."""
    document: dict[str, Any] = {
        "ociVersion": OCI_VERSION, "id": state.id, "status": status, "pid": state.pid, "bundle": state.bundle,
    }  # fmt: skip
    return {**document, "annotations": annotations} if annotations else document


def runc_state(state: State, status: str, annotations: dict[str, str]) -> dict[str, Any]:
    """Return the document that `state` and `list --format json` print, with the members that runc adds."""
    return {
        "ociVersion": OCI_VERSION,
        "id": state.id,
        "pid": 0 if status == "stopped" else state.pid,
        "status": status,
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        **({"annotations": annotations} if annotations else {}),
        "owner": state.owner,
    }
