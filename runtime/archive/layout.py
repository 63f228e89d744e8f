"""What is in an archive, and under which name. Pure.

    spec.dump              config.json as it was
    config.dump            what the container engine knows of it: id, name, image, times
    checkpoint/            the image directory
    rootfs-diff.tar        files of the rootfs that the base image has not; all of them where there is none
    deleted.files          JSON list of what the base image has and the container has no more
    devshm-checkpoint.tar  podman's only: what is in /dev/shm
    volumes/NAME.tar       podman's only: what is in a named volume
    network.status         null: no network of the engine's
    stats-dump             CRIU's statistics
    ferry.digests          ours only; see `digests`

Source: what podman 4.3 writes, and checkpointctl 1.3 reads.
"""

from __future__ import annotations

import hashlib
from typing import Any

from runtime.errors import SpecError
from runtime.values import Value

SPEC, CONFIG, NETWORK = "spec.dump", "config.dump", "network.status"
ROOTFS, DELETED, SHM = "rootfs-diff.tar", "deleted.files", "devshm-checkpoint.tar"
STATS, DIGESTS, SIGNATURE = "stats-dump", "ferry.digests", "ferry.digests.sig"
IMAGES, VOLUMES = "checkpoint", "volumes"
_MANAGER = "io.container.manager"


def spec_document(config: dict[str, Any], rootfs: str) -> dict[str, Any]:
    """Return the spec.dump of a container: podman and checkpointctl know a document of podman's kind by its annotation."""
    annotations = {**(config.get("annotations") or {}), _MANAGER: "libpod"}
    return {**config, "root": {**(config.get("root") or {}), "path": rootfs}, "annotations": annotations}


def config_document(
    container_id: str, image: str | None, runtime: str, created: str, now: str, spec: dict[str, Any]
) -> dict[str, Any]:
    """Return the config.dump of a container. `image` is its base image, `runtime` what podman restores with. Times: RFC 3339."""
    return {
        # podman's ids are digests.
        "id": hashlib.sha256(f"{container_id} {created}".encode()).hexdigest(),
        "name": container_id,
        "spec": spec,
        "idMappingsOptions": {"HostUIDMapping": True, "HostGIDMapping": True},
        "rootfsImageName": image or "",
        "rootfsImageID": image or "",  # podman finds it by either, and wants both
        "createdTime": created,
        "checkpointedAt": now,
        "runtime": runtime,
        "stopSignal": 15,
        "stopTimeout": 10,
        "logDriver": "k8s-file",
        "command": (spec.get("process") or {}).get("args") or [],
    }


class Replacement(Value):
    """A mount whose source was the engine's own, and is now below the bundle. `content` is a file's, None for a directory."""

    destination: str
    path: str
    content: str | None
    member: str | None  # the archive's, with what is in it


def adapt(spec: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, Any], list[Replacement]]:
    """Return a config.json for a bundle of our own, and what must be made below the bundle for it. Raises: SpecError."""
    if not isinstance(spec.get("root"), dict):
        raise SpecError(f"{SPEC}: has no /root")
    mounts, made = [], []
    volumes = {}
    for volume in config.get("namedVolumes") or []:
        if isinstance(volume, dict):
            volumes[str(volume.get("dest"))] = str(volume.get("volumeName"))
    own = f"/{config['id']}/" if isinstance(config.get("id"), str) and config["id"] else None
    for number, mount in enumerate(spec.get("mounts") or []):
        if not isinstance(mount, dict):
            raise SpecError(f"{SPEC}: /mounts/{number} is no object")
        destination, source = str(mount.get("destination")), str(mount.get("source"))
        if mount.get("type") == "bind" and (destination in volumes or (own and own in source)):
            made.append(_replacement(number, destination, volumes.get(destination), str(spec.get("hostname") or "")))
            mount = {**mount, "source": made[-1].path}
        mounts.append(mount)
    linux = {k: v for k, v in (spec.get("linux") or {}).items() if k != "cgroupsPath"}  # the engine's; here is another
    annotations = {k: v for k, v in (spec.get("annotations") or {}).items() if k != _MANAGER}
    document = {**spec, "root": {**spec["root"], "path": "rootfs"}, "mounts": mounts, "linux": linux, "annotations": annotations}
    return document, made


def _replacement(number: int, destination: str, volume: str | None, hostname: str) -> Replacement:
    path = f"mounts/{number}"
    if volume is not None:
        return Replacement(destination, path, None, f"{VOLUMES}/{volume}.tar")
    if destination == "/dev/shm":
        return Replacement(destination, path, None, SHM)
    if destination == "/etc/hosts":
        return Replacement(destination, path, f"127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost\n", None)
    if destination == "/etc/hostname":
        return Replacement(destination, path, f"{hostname}\n", None)
    if destination in ("/run/secrets", "/var/run/secrets"):
        return Replacement(destination, path, None, None)
    return Replacement(destination, path, "", None)
