"""A root that is an overlay, on the host that it leaves: what of it goes, and what is removed in the end."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrate import layer_store, layers, overlay, processes
from migrate.errors import MigrateError, ProtocolError, TransferFailed
from migrate.manifest import Inode
from migrate.overlay import Overlay
from migrate.rootfs import DIRECTORY, opened_parent
from migrate.tree import Tree

_WHY = "it is the upper layer of an overlay: nobody is told what is written through that"


def checked(plan: dict[str, Any], rootfs: str) -> Overlay | None:
    """Return the overlay of a plan, None for none. Raises: ProtocolError when the root is another, MigrateError."""
    planned = noted(plan)
    found = layers.at(rootfs)
    if found is not None and found.unsupported:
        raise ProtocolError(f"{rootfs} is an overlay with {found.unsupported[0]}")
    if (found is None) != (planned is None) or (found and planned and _places(found) != _places(planned)):
        raise ProtocolError(f"{rootfs} is not the overlay that the plan is for")
    return planned


def noted(plan: dict[str, Any]) -> Overlay | None:
    """Return the overlay of a plan. Raises: MigrateError."""
    try:
        return Overlay.from_json(plan["overlay"]) if plan.get("overlay") else None
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise MigrateError(f"the overlay of the plan is none: {e}") from e


def _places(of: Overlay) -> tuple[str, ...]:
    return (of.root, of.upper, of.work, *(layer.path for layer in of.layers))


def own_directories(of: Overlay | None, bundle: str) -> tuple[str, ...]:
    """Return what belongs to the container alone, and does not lie in its bundle."""
    return () if of is None else tuple(p for p in (of.upper, of.work) if not p.startswith(f"{bundle}/"))


def trees(of: Overlay | None, bundle: str, volumes: tuple[str, ...]) -> tuple[tuple[Tree, str], ...]:
    """Return all that is followed, and where each is on the target."""
    left_out = of.inside(bundle) if of else ()
    found = [(Tree(Path(bundle), leave_out=left_out), bundle), *((Tree(Path(v)), v) for v in volumes)]
    if of:
        found.append((Tree(Path(of.upper), watched=False, reason=_WHY), f"{overlay.beside(bundle)}/upper"))
    return tuple(found)


def mapped(of: Overlay, members: list[Path], tree: Tree) -> set[Inode]:
    """Return the files of the upper layer that processes of the container have mapped shared and writable.

    The kernel tells of them as files of the overlay, whose numbers are other ones: they are found by their names.
    """
    names = processes.mapped_names(members, os.stat(of.root).st_dev)
    if names is None:
        return _any_file(tree)
    found: set[Inode] = set()
    root_fd = os.open(of.upper, DIRECTORY)
    try:
        for name in names:
            try:
                with opened_parent(root_fd, name) as (parent, last):
                    st = os.stat(last, dir_fd=parent, follow_symlinks=False)
            except (OSError, ProtocolError):
                return _any_file(tree)  # it has another name, below a mount of a part of the root
            if stat.S_ISREG(st.st_mode):
                found.add((st.st_dev, st.st_ino))
    finally:
        os.close(root_fd)
    return found


def _any_file(tree: Tree) -> set[Inode]:
    return {item.inode for item in tree.items.values() if item.is_file}


def remove_root(of: Overlay | None, bundle: str, remove: Callable[[str], None]) -> None:
    """Unmount the overlay, if it is one, and remove what is the container's own. Idempotent. Raises: MigrateError, OSError."""
    if of is None:
        remove(bundle)
        return
    layers.unmount(of)
    if elsewhere := layers.mounted_with(of.upper):
        raise TransferFailed(f"{of.upper} is kept: it is mounted at {elsewhere[0]}", hint="unmount it, then remove it by hand")
    for path in (*own_directories(of, bundle), bundle):
        remove(path)
    with contextlib.suppress(OSError):
        os.rmdir(overlay.beside(bundle))
    layer_store.leave(overlay.beside(bundle))
