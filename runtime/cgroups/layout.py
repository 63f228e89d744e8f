"""How this host's cgroup trees are mounted: v1, v2, or hybrid (v1 controllers beside a v2 tree without them)."""

from __future__ import annotations

import posixpath

from runtime.errors import ContainerError
from runtime.linux.procfs import Mount, parse_cgroup
from runtime.values import Value


class Hierarchy(Value):
    """One mounted tree."""

    name: str  # of its directory below the common mount point
    mount_point: str
    fstype: str  # cgroup or cgroup2
    controllers: tuple[str, ...]  # v1 only; `name=x` for a named one
    own_path: str  # where the reading process is in it

    @property
    def key(self) -> str:
        """The name by which the container's paths are kept: the first controller, "" for v2."""
        return "" if self.fstype == "cgroup2" else self.controllers[0]

    @property
    def mount_data(self) -> str:
        if self.fstype == "cgroup2":
            return ""
        return ",".join(f"none,{n}" if n.startswith("name=") else n for n in self.controllers)

    @property
    def aliases(self) -> tuple[str, ...]:
        return tuple(n for n in self.controllers if n != self.name and not n.startswith("name="))


class Layout(Value):
    mode: str  # v1, v2, hybrid
    hierarchies: tuple[Hierarchy, ...]

    def of(self, controller: str) -> Hierarchy | None:
        """Return the tree that carries a v1 controller ("" for the v2 tree)."""
        return next((h for h in self.hierarchies if (h.key == "" if controller == "" else controller in h.controllers)), None)


def detect(mounts: list[Mount], own_cgroup: str) -> Layout:
    """Read the layout out of mountinfo and the text of /proc/self/cgroup. Pure.

    Raises: ContainerError where no cgroup tree is mounted.
    """
    own = parse_cgroup(own_cgroup)
    found: dict[str, Hierarchy] = {}
    for mount in mounts:
        if mount.root.startswith("/.."):
            continue  # the view of another cgroup namespace
        if mount.fstype == "cgroup2":
            h = Hierarchy(posixpath.basename(mount.mount_point), mount.mount_point, "cgroup2", (), own.get("", "/"))
        elif mount.fstype == "cgroup":
            options = mount.super_options.split(",")
            controllers = tuple(o for o in options if o in own)
            if not controllers:
                continue
            name = posixpath.basename(mount.mount_point)
            h = Hierarchy(name, mount.mount_point, "cgroup", controllers, own[controllers[0]])
        else:
            continue
        found.setdefault(h.key, h)
    if not found:
        raise ContainerError("no cgroup tree is mounted", hint="mount one: mount -t cgroup2 cgroup2 /sys/fs/cgroup")
    v1 = any(h.fstype == "cgroup" for h in found.values())
    mode = ("hybrid" if "" in found else "v1") if v1 else "v2"
    return Layout(mode, tuple(found.values()))
