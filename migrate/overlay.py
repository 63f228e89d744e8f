"""A root that is an overlay: layers that are only read, and the container's own on top of them. Pure.

A layer is known by its digest, which `migrate.layers` takes of all that is in it: a host that has it is not sent it again.

Source: the kernel's Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from migrate.mounts import unescaped

DIGEST = re.compile(r"[0-9a-f]{40}")
# What mount(2) takes of options, less what these are besides the layers.
_MOST_BYTES = 3900
# Said of the mount, not of what is in it; each host has its own.
_OF_THE_MOUNT = {"rw", "relatime", "noatime", "nodiratime", "lazytime", "seclabel", "xino=off", "uuid=null"}
# They mean the same on any host.
_KEPT = {
    "index=off", "nfs_export=off", "redirect_dir=on", "redirect_dir=off", "redirect_dir=follow", "redirect_dir=nofollow",
    "metacopy=on", "metacopy=off", "userxattr", "volatile", "xino=on", "xino=auto", "uuid=on", "uuid=auto", "uuid=off",
    "default_permissions",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """One that is only read. Units: bytes. `digest` is "" while nobody has looked at what is in it."""

    path: str
    digest: str = ""
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Overlay:
    """`layers` are in the order of their mount option, the topmost first. `unsupported` is what cannot be made elsewhere."""

    root: str
    layers: tuple[Layer, ...]
    upper: str
    work: str
    options: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()

    @classmethod
    def read(cls, root: str, options: str, usual: Mapping[str, str]) -> Self:
        """Read the options that /proc/self/mountinfo has of the file system which is mounted at `root`.

        `usual` are those that the kernel does not tell, since they are its own: on another host they may be other ones.
        """
        lower: list[str] = []
        single: dict[str, str] = {}
        kept: dict[str, str] = {}
        unsupported = []
        for option in options.split(","):  # one in a name is escaped
            key, _, value = unescaped(option).partition("=")
            if key == "lowerdir":
                lower += [_name(p) for p in re.split(r"(?<!\\):", value)]
            elif key == "lowerdir+":
                lower.append(_name(value))
            elif key in ("upperdir", "workdir"):
                single[key] = _name(value)
            elif option not in _OF_THE_MOUNT:
                kept[key] = value
        # With attributes of users the kernel refuses to be told these two.
        untold = {"redirect_dir", "metacopy"} if "userxattr" in kept else set()
        told = {**{k: v for k, v in usual.items() if k not in untold}, **kept}
        options_of = tuple(sorted(f"{key}={value}" if value else key for key, value in told.items()))
        unsupported += [f"the option {option}" for option in options_of if option not in _KEPT]
        kept_options = tuple(option for option in options_of if option in _KEPT)
        found = cls(root, tuple(Layer(p) for p in lower), single.get("upperdir", ""), single.get("workdir", ""), kept_options)
        return replace(found, unsupported=(*unsupported, *found._unusable()))

    def _unusable(self) -> list[str]:
        found = []
        if not self.upper:
            found.append("no layer of its own, so that nothing can be written")
        paths = [p for p in (*(layer.path for layer in self.layers), self.upper, self.work) if p]
        found += [
            f"the layer {p}, whose path is relative, or has a comma, a colon or a backslash in it"
            for p in paths
            if not _is_plain(p)
        ]
        if any(layer.path == "" for layer in self.layers):
            found.append("layers that hold nothing but data")
        return found

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what another host sent. Raises: ValueError, TypeError, KeyError."""
        layers = tuple(Layer(_path(e["path"]), _digest(e["digest"]), int(e["size_bytes"])) for e in document["layers"])
        options = tuple(str(o) for o in document["options"])
        if unknown := set(options) - _KEPT:
            raise ValueError(f"unknown options of an overlay: {', '.join(sorted(unknown))}")
        root, unsupported = str(document["root"]), tuple(map(str, document["unsupported"]))
        if not root.startswith("/") or posixpath.normpath(root) != root or "\0" in root:
            raise ValueError(f"{root!r} is no path of a root")
        return cls(root, layers, _optional(document["upper"]), _optional(document["work"]), options, unsupported)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(layer.digest for layer in self.layers)

    def size_without(self, there: tuple[str, ...]) -> int:
        """Return how many bytes the layers have that are not among these digests."""
        missing = {layer.digest: layer.size_bytes for layer in self.layers if layer.digest not in there}
        return sum(missing.values())

    def elsewhere(self, bundle: str, store: str) -> Self:
        """Return the same overlay as it is made on another host: its own layer beside the bundle, the others in the store.

        Nobody who writes what is in the bundle, or in that layer, can so choose where it is.
        """
        if self.unsupported or not all(self.digests) or not self.root.startswith(f"{bundle}/") or not _is_plain(bundle):
            raise ValueError(f"an overlay at {self.root} cannot be made for the bundle {bundle}")
        layers = tuple(replace(layer, path=f"{store}/{layer.digest}") for layer in self.layers)
        found = replace(self, layers=layers, upper=f"{beside(bundle)}/upper", work=f"{beside(bundle)}/work")
        if len(found.mount_options()) > _MOST_BYTES:
            raise ValueError(f"an overlay of {len(layers)} layers is more than one mount takes")
        return found

    def mount_options(self) -> str:
        """Return the options of mount(8)."""
        lower = ":".join(layer.path for layer in self.layers)
        # What is not said here would be the kernel's own choice, and another one on each host.
        return ",".join([f"lowerdir={lower}", f"upperdir={self.upper}", f"workdir={self.work}", *self.options])

    def inside(self, directory: str) -> tuple[bytes, ...]:
        """Return which of its directories lie in another one: their paths there."""
        paths = [*(layer.path for layer in self.layers), self.upper, self.work]
        return tuple(posixpath.relpath(p, directory).encode() for p in paths if p.startswith(directory.rstrip("/") + "/"))


def beside(bundle: str) -> str:
    """Return the directory that a bundle's own layer is in where Ferry made it."""
    return f"{bundle}.overlay"


def _name(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text)


def _is_plain(path: str) -> bool:
    return path.startswith("/") and posixpath.normpath(path) == path and not set(path) & set(",:\\\n\0")


def _path(text: Any) -> str:
    if not isinstance(text, str) or not _is_plain(text) or text == "/":
        raise ValueError(f"{text!r} is no path of a layer")
    return text


def _optional(text: Any) -> str:
    return _path(text) if text else ""


def _digest(text: Any) -> str:
    if not isinstance(text, str) or not DIGEST.fullmatch(text):
        raise ValueError(f"{text!r} is no digest of a layer")
    return text
