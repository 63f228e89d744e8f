"""The layers of overlays on this host: look at them, tell what is in them, mount them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from migrate import mounts, places
from migrate.errors import TransferFailed
from migrate.incoming import own_attributes
from migrate.manifest import Inode, Item
from migrate.overlay import DIGEST, Layer, Overlay
from migrate.rootfs import DIRECTORY, open_regular, opened_parent, scan

_PIECE_BYTES = 1 << 20
_PARAMETERS = Path("/sys/module/overlay/parameters")
_UMOUNT_NOFOLLOW = 8
_libc = ctypes.CDLL(None, use_errno=True)


def at(root: str | Path) -> Overlay | None:
    """Return the overlay that is mounted at a path, its layers without digests; None when there is none, but something else."""
    real = os.path.realpath(root)
    mounted = [m for m in mounts.all_mounts() if m.point == real]
    if not mounted or mounted[-1].kind != "overlay":
        return None
    mount = mounted[-1]
    found = Overlay.read(real, mount.options, _usual())
    strange = [] if mount.root == "/" else ["only a part of it mounted there"]
    elsewhere = {m.point for m in mounts.all_mounts() if m.device == mount.device} | set(mounted_with(found.upper))
    strange += [f"another mount, at {point}" for point in sorted(elsewhere - {real})]
    return replace(found, unsupported=(*found.unsupported, *strange))


def _usual() -> dict[str, str]:
    """Return the options of an overlay that nobody asked for, and that the kernel therefore does not tell."""

    def is_on(name: str, otherwise: bool = False) -> bool:
        try:
            return (_PARAMETERS / name).read_text().strip() == "Y"
        except OSError:
            return otherwise

    follows = "follow" if is_on("redirect_always_follow", otherwise=True) else "nofollow"
    return {
        "index": "on" if is_on("index") else "off",
        "nfs_export": "on" if is_on("nfs_export") else "off",
        "redirect_dir": "on" if is_on("redirect_dir") else follows,
        "metacopy": "on" if is_on("metacopy") else "off",
    }


def mounted_with(upper: str) -> list[str]:
    """Return where overlays are mounted that have this upper layer."""
    found = [m for m in mounts.all_mounts() if m.kind == "overlay"]
    return [m.point for m in found if upper and Overlay.read(m.point, m.options, {}).upper == upper]


def looked_at(overlay: Overlay) -> Overlay:
    """Return an overlay with the digests and sizes of its layers. Raises: TransferFailed."""
    if overlay.unsupported:
        return replace(overlay, layers=(), upper="", work="", options=())
    return replace(overlay, layers=tuple(_looked_at(Path(layer.path)) for layer in overlay.layers))


def _looked_at(path: Path) -> Layer:
    if path.parent == places.LAYERS and DIGEST.fullmatch(path.name):
        return Layer(str(path), path.name, size(path))
    return Layer(str(path), *digest(path))


def size(root: Path) -> int:
    """Return how many bytes the files of a layer have. Raises: TransferFailed."""
    return sum({item.inode: item.size for item in scan(root).values()}.values())


def digest(root: Path) -> tuple[str, int]:
    """Return what tells a layer from all that differ from it in anything a container sees, and how many bytes its files have.

    The time of modification of the root itself is left out: nobody but who makes the layer sees it. So are the labels that a
    host's security module gives. Raises: TransferFailed.
    """
    manifest = scan(root)
    total, read_bytes = hashlib.blake2b(digest_size=20), 0
    names: dict[Inode, bytes] = {}
    root_fd = os.open(root, DIRECTORY)
    try:
        for path in sorted(manifest):
            item = manifest[path]
            first = names.setdefault(item.inode, path) if item.is_file and item.links > 1 else path
            try:
                one, read = _entry(root_fd, item, first)
            except OSError as e:
                raise TransferFailed(f"cannot read {root}/{os.fsdecode(path)}: {e.strerror}") from e
            total.update(one)
            read_bytes += read
    finally:
        os.close(root_fd)
    return total.hexdigest(), read_bytes


def _entry(root_fd: int, item: Item, first: bytes) -> tuple[bytes, int]:
    """Return the digest of one entry, and how much content it has. Raises: OSError."""
    told = hashlib.blake2b(digest_size=20)
    is_root = item.path == b"."
    device = item.rdev if stat.S_ISCHR(item.mode) or stat.S_ISBLK(item.mode) else 0
    when = 0 if is_root else item.mtime_ns
    _tell(told, item.path, first, *(b"%d" % n for n in (item.mode, item.uid, item.gid, device, when, item.size)))
    if is_root:
        _tell(told, *_xattrs(f"/proc/self/fd/{root_fd}", follow=True))
        return told.digest(), 0
    read = 0
    if first != item.path:
        return told.digest(), 0
    with opened_parent(root_fd, item.path) as (parent, name):
        if stat.S_ISLNK(item.mode):
            _tell(told, os.fsencode(os.readlink(name, dir_fd=parent)))
        _tell(told, *_xattrs(f"/proc/self/fd/{parent}/{os.fsdecode(name)}", follow=False))
        if item.is_file:
            fd = open_regular(name, parent)
            if fd is None:
                raise FileNotFoundError(2, "it was another kind of file a moment ago")
            with open(fd, "rb", buffering=0) as f:
                while data := f.read(_PIECE_BYTES):
                    told.update(data)
                    read += len(data)
    return told.digest(), read


def _xattrs(path: str, follow: bool) -> Iterator[bytes]:
    for name in sorted(own_attributes(path, follow)):
        yield os.fsencode(name)
        yield os.getxattr(path, name, follow_symlinks=follow)


def _tell(told: hashlib.blake2b, *fields: bytes) -> None:
    for field in fields:
        told.update(b"%d:" % len(field) + field)


def mount(overlay: Overlay, bundle: str) -> None:
    """Mount an overlay at its root in the bundle, unless it is. Raises: TransferFailed, OSError."""
    mounted = at(overlay.root)
    if mounted is not None and mounted.upper == overlay.upper:
        return
    bundle_fd = os.open(bundle, DIRECTORY)
    try:
        # Whoever wrote what is in the bundle may have put a link there.
        with opened_parent(bundle_fd, os.fsencode(os.path.relpath(overlay.root, bundle))) as (parent, name):
            fd = os.open(name, DIRECTORY, dir_fd=parent)
    finally:
        os.close(bundle_fd)
    try:
        _mount(overlay, f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _mount(overlay: Overlay, where: str) -> None:
    options = overlay.mount_options().encode()
    # mount(8) may have the options cut into pieces that are too small for many layers.
    if _libc.mount(b"overlay", os.fsencode(where), b"overlay", ctypes.c_ulong(0), options):
        number = ctypes.get_errno()
        hint = "can its file system be the upper layer of an overlay? dmesg says more"
        raise TransferFailed(f"cannot mount an overlay at {overlay.root}: {os.strerror(number)}", hint=hint)


def unmount(overlay: Overlay) -> None:
    """Take an overlay away from its root. Idempotent. Raises: TransferFailed."""
    mounted = at(overlay.root)
    if mounted is not None and mounted.upper == overlay.upper and _libc.umount2(os.fsencode(overlay.root), _UMOUNT_NOFOLLOW):
        raise TransferFailed(f"cannot unmount {overlay.root}: {os.strerror(ctypes.get_errno())}", hint="who uses it? fuser -m")


def try_to_mount(overlay: Overlay, scratch: Path) -> None:
    """Mount an overlay of the same kind for a moment, in a directory that is made for it. Raises: TransferFailed, OSError."""
    trial = replace(overlay, root=str(scratch / "root"), upper=str(scratch / "upper"), work=str(scratch / "work"))
    for path in (trial.root, trial.upper, trial.work):
        os.makedirs(path, 0o700)
    try:
        _mount(trial, trial.root)
        unmount(trial)
    finally:
        if not mounts.below(scratch):
            shutil.rmtree(scratch)
