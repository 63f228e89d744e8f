"""The layers of overlays on this host: look at them, keep them by their digests, mount them.

    /var/lib/ferry/layers/DIGEST        a layer that another host sent; nothing in it is ever changed
    /var/lib/ferry/layers/.ID-N         one that is on its way, of the move ID

What is in the store stays there for the next container that has it: `migrate layers` lists and removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from migrate import mounts, places
from migrate.errors import TransferFailed
from migrate.manifest import Inode, Item
from migrate.overlay import DIGEST, Layer, Overlay
from migrate.rootfs import DIRECTORY, open_regular, opened_parent, scan

_PIECE_BYTES = 1 << 20
_TIMEOUT_S = 30.0


def at(root: str | Path) -> Overlay | None:
    """Return the overlay that is mounted at a path, its layers without digests; None when there is none, but something else."""
    real = os.path.realpath(root)
    mounted = [m for m in mounts.all_mounts() if m.point == real]
    return Overlay.read(real, mounted[-1].options) if mounted and mounted[-1].kind == "overlay" else None


def looked_at(overlay: Overlay) -> Overlay:
    """Return an overlay with the digests and sizes of its layers. Raises: TransferFailed."""
    if overlay.unsupported:
        return replace(overlay, layers=(), upper="", work="", options=())
    return replace(overlay, layers=tuple(Layer(layer.path, *digest(Path(layer.path))) for layer in overlay.layers))


def digest(root: Path) -> tuple[str, int]:
    """Return what tells a layer from all that differ from it in anything a container sees, and how many bytes its files have.

    The time of modification of the root itself is left out: nobody but who makes the layer sees it. Raises: TransferFailed.
    """
    manifest = scan(root)
    total, size = hashlib.blake2b(digest_size=20), 0
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
            size += read
    finally:
        os.close(root_fd)
    return total.hexdigest(), size


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
    size = 0
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
                    size += len(data)
    return told.digest(), size


def _xattrs(path: str, follow: bool) -> Iterator[bytes]:
    for name in sorted(os.listxattr(path, follow_symlinks=follow)):
        yield os.fsencode(name)
        yield os.getxattr(path, name, follow_symlinks=follow)


def _tell(told: hashlib.blake2b, *fields: bytes) -> None:
    for field in fields:
        told.update(b"%d:" % len(field) + field)


def stored() -> dict[str, int]:
    """Return the layers that are kept here: how many bytes each takes."""
    try:
        names = sorted(n for n in os.listdir(places.LAYERS) if DIGEST.fullmatch(n))
    except FileNotFoundError:
        return {}
    return {n: _size(places.LAYERS / n) for n in names}


def have(digests: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of these layers are kept here."""
    return tuple(d for d in dict.fromkeys(digests) if DIGEST.fullmatch(d) and (places.LAYERS / d).is_dir())


def _size(root: Path) -> int:
    return sum({item.inode: item.size for item in scan(root).values()}.values())


def keep(arrived: Path, expected: str) -> None:
    """Put a layer that has come into the store. Raises: TransferFailed when it is not what it was said to be; OSError."""
    found, _ = digest(arrived)
    if found != expected:
        raise TransferFailed(
            f"a layer has come as another one: {found} and not {expected}", hint="can this file system keep all attributes?"
        )
    try:
        arrived.rename(places.LAYERS / expected)
    except OSError:
        if not have((expected,)):
            raise
        shutil.rmtree(arrived)  # another move was faster


def in_use() -> set[str]:
    """Return the digests of the layers that are mounted on this host, as far as this mount namespace shows."""
    found = set()
    for mount in mounts.all_mounts():
        if mount.kind == "overlay":
            for layer in Overlay.read(mount.point, mount.options).layers:
                path = Path(layer.path)
                if path.parent == places.LAYERS:
                    found.add(path.name)
    return found


def remove(digest: str) -> None:
    """Remove a layer from the store, at once or not at all. Idempotent."""
    gone = places.LAYERS / f".gone-{digest}"
    with contextlib.suppress(OSError):
        (places.LAYERS / digest).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        places.LAYERS.rmdir()


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
        # As the descriptor says, not as its path is read once more.
        _run(
            "mount",
            "--no-canonicalize",
            "-t",
            "overlay",
            "-o",
            overlay.mount_options(),
            "overlay",
            f"/proc/self/fd/{fd}",
            fds=(fd,),
        )
    finally:
        os.close(fd)


def unmount(overlay: Overlay) -> None:
    """Take an overlay away from its root. Idempotent. Raises: TransferFailed."""
    mounted = at(overlay.root)
    if mounted is not None and mounted.upper == overlay.upper:
        _run("umount", "--no-canonicalize", overlay.root)


def _run(*argv: str, fds: tuple[int, ...] = ()) -> None:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, pass_fds=fds
        )
    except OSError as e:
        raise TransferFailed(f"cannot run {argv[0]}: {e.strerror}") from e
    except subprocess.TimeoutExpired as e:
        raise TransferFailed(f"{' '.join(argv)} does not end") from e
    if done.returncode:
        raise TransferFailed(f"{' '.join(argv)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
