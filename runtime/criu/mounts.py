"""The mounts of a container that lead to the host: CRIU must be told where they come from, on both sides."""

from __future__ import annotations

import os

from runtime.cgroups.manager import Manager
from runtime.errors import KernelError, NotFound
from runtime.linux.procfs import Mount
from runtime.process import places
from runtime.setup.plan import DEFAULT_DEVICES, bind_mounts, destination, needs_devices
from runtime.spec.config import Spec


def external(spec: Spec, bundle: str, manager: Manager) -> dict[str, str]:
    """Return destination -> source of every mount that is a part of the host's tree.

    Without a cgroup namespace the cgroup mounts are bound from the host's own. With a user namespace they are at a restore:
    CRIU cannot mount them there, and looked at from inside it is the same.
    """
    found = bind_mounts(spec, bundle)
    if spec.linux.namespace("cgroup") is None or spec.linux.namespace("user") is not None:
        for mount in spec.mounts:
            if mount.type == "cgroup":
                found.update(manager.bound_at(destination(mount.destination)))
    if spec.linux.namespace("user") is not None:
        # Nobody can make nodes there: the host's are bound, and what masks files is such a node, too.
        if needs_devices(spec):
            found.update({destination(d.path): d.path for d in (*DEFAULT_DEVICES, *spec.linux.devices)})
        found.update({destination(p): "/dev/null" for p in spec.linux.masked_paths})
    return found


# What masks files is a bind mount of this. runc's images know each of these mounts by this one key; ours have them inside.
RUNC_MASK = {"/dev/null": "/dev/null"}


def without_masked_directories(found: dict[str, str], spec: Spec, mounted: list[Mount]) -> dict[str, str]:
    """Return the mounts of `external` as a running container has them: what masks a directory is a tmpfs of its own."""
    own = {m.mount_point for m in mounted if m.fstype == "tmpfs" and m.root == "/"}
    masked = {destination(p) for p in spec.linux.masked_paths}
    return {place: source for place, source in found.items() if place not in masked & own}


def require_sources(sources: dict[str, str]) -> None:
    """Refuse a restore that lacks what is mounted from the host. Raises: NotFound with all that is missing."""
    missing = [f"{source} (mounted at {place})" for place, source in sources.items() if not os.path.exists(source)]
    if missing:
        raise NotFound(f"not on this host: {', '.join(missing)}", hint="make it here, or change /mounts in config.json")


def make_places(spec: Spec, rootfs: str, sources: dict[str, str]) -> None:
    """Make what CRIU mounts on, where the rootfs is another than the one that was dumped. Raises: KernelError.

    What lies below another mount is in the images, or in that mount.
    """
    wanted = {destination(m.destination): True for m in spec.mounts}
    wanted.update({place: os.path.isdir(source) for place, source in sources.items()})
    root_fd = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for place, is_directory in wanted.items():
            if not any(place.startswith(other + "/") for other in wanted):
                try:
                    places.ensure(root_fd, place, is_directory)
                except OSError as e:
                    raise KernelError(f"cannot make mount point {place} in {rootfs}", e.errno or 0) from e
    finally:
        os.close(root_fd)
