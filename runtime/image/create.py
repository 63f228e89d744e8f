"""Make a bundle out of an image, a tarball or a directory: unpacked, or of overlay layers that bundles share.

LAYERS/sha256-HEX/        one layer, by the digest of its tar, as overlayfs wants it; never changed again
BUNDLE/config.json, .ferry-bundle (says that we made it)
BUNDLE/rootfs/            the unpacked rootfs; or where the overlay is mounted
BUNDLE/overlay.json       the layers of an overlay, the lowest first
BUNDLE/upper/ work/       what the overlay's container writes
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime import files
from runtime.errors import AlreadyExists, ContainerError, KernelError, SpecError
from runtime.image.config import Accounts, apply_image
from runtime.image.source import Layer, Source, is_rootfs_directory, open_source
from runtime.image.unpack import Unpacker
from runtime.linux.mount import mount, openat2, umount2
from runtime.linux.procfs import read_mountinfo
from runtime.spec.defaults import default_config, rootless_config

MARK = ".ferry-bundle"  # what we may remove again
_MAX_ACCOUNTS_BYTES = 4 << 20
_MAX_OVERLAY_DATA = 4095  # one page, as mount(2) takes it


def create_bundle(path: Path, source: Path, *, reference: str | None, platform: str | None, layers: Path | None) -> None:
    """Make a bundle at `path`; with `layers`, of overlay layers kept below that directory.

    Raises: AlreadyExists; ContainerError, SpecError: then the bundle is gone again, complete layers stay.
    """
    try:
        # Closed to others: the rootfs may hold programs that change their user, and device nodes.
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise AlreadyExists(f"bundle {path} exists", hint="choose another path, or remove it") from None
    except OSError as e:
        raise KernelError(f"cannot make bundle {path}", e.errno or 0) from e
    try:
        rootfs = path / "rootfs"
        rootfs.mkdir(mode=0o755)
        image: dict[str, Any] = {}
        if is_rootfs_directory(source):
            if layers is not None:
                raise SpecError(f"--layers: {source} is a directory and has no layers")
            _copy(source, rootfs)
        else:
            opened = open_source(source, reference, platform)
            image = opened.image.config
            if layers is None:
                _unpack(opened, rootfs)
            else:
                _overlay(opened, path, layers)
        document = default_config() if os.geteuid() == 0 else rootless_config(os.geteuid(), os.getegid())
        if image:
            apply_image(document, image, _accounts(rootfs))
        (path / MARK).touch()
        (path / "config.json").write_text(json.dumps(document, indent="\t") + "\n")
    except BaseException:
        with contextlib.suppress(ContainerError):
            unmount(path)
        shutil.rmtree(path, ignore_errors=True)
        raise


def _copy(source: Path, rootfs: Path) -> None:
    done = subprocess.run(["cp", "-a", "--reflink=auto", "--", f"{source}/.", str(rootfs)], capture_output=True, text=True)
    if done.returncode:
        raise ContainerError(f"cannot copy {source}: {done.stderr.strip()}")


def _unpack(source: Source, rootfs: Path) -> None:
    unpacker = Unpacker(str(rootfs))
    try:
        for layer in source.image.layers:
            with source.layer(layer) as tar:
                unpacker.apply(tar)
    finally:
        unpacker.close()


def _overlay(source: Source, path: Path, store: Path) -> None:
    if os.geteuid() != 0:
        raise ContainerError("--layers: only root may mount an overlay of shared layers")
    names = []
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    for layer in source.image.layers:
        if layer.diff_id is None:
            raise SpecError("--layers: the source has no digests of its layers", hint="leave --layers out")
        names.append(_layer(source, layer, store))
    for name in ("upper", "work"):
        (path / name).mkdir()
    files.save_json(path / "overlay.json", {"store": str(store.absolute()), "layers": names})
    mount_overlay(path)


def _layer(source: Source, layer: Layer, store: Path) -> str:
    """Unpack a layer into the store unless it is there; return its name."""
    assert layer.diff_id is not None
    name = layer.diff_id.replace(":", "-")
    if "/" in name or name.startswith("."):
        raise SpecError(f"diff id {layer.diff_id!r} is no digest")
    with _locked(store):
        if (store / name).is_dir():
            return name
        partial = store / f".{name}.{os.getpid()}"
        partial.mkdir(mode=0o755)
        try:
            unpacker = Unpacker(str(partial), overlay=True)
            try:
                with source.layer(layer) as tar:
                    unpacker.apply(tar)
            finally:
                unpacker.close()
            partial.rename(store / name)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return name


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def mount_overlay(path: Path) -> None:
    """Mount a bundle's overlay on its rootfs, as after a reboot. Idempotent. Raises: ContainerError."""
    path = path.absolute()
    try:
        document = json.loads((path / "overlay.json").read_bytes())
        store, names = Path(document["store"]), [str(n) for n in document["layers"]]
    except FileNotFoundError:
        raise ContainerError(f"bundle {path} has no overlay", hint="it was made without --layers") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ContainerError(f"{path}/overlay.json is damaged: {e}") from e
    if mounted(path):
        return
    # Relative to the store: many layers fit into the page that mount(2) reads.
    data = f"lowerdir={':'.join(reversed(names))},upperdir={path}/upper,workdir={path}/work"
    if len(data.encode()) > _MAX_OVERLAY_DATA:
        raise ContainerError(f"the image has too many layers for one overlay: {len(names)}", hint="leave --layers out")
    before = os.getcwd()
    try:
        os.chdir(store)
        mount("overlay", str(path / "rootfs"), "overlay", 0, data)
    except OSError as e:
        raise KernelError(f"cannot mount the overlay of {path}", e.errno or 0) from e
    finally:
        os.chdir(before)


def mounted(path: Path) -> bool:
    """Say whether something is mounted on a bundle's rootfs."""
    rootfs = os.path.realpath(path / "rootfs")
    return any(m.mount_point == rootfs for m in read_mountinfo())


def unmount(path: Path) -> None:
    """Unmount a bundle's overlay. Idempotent. Raises: KernelError."""
    if mounted(path):
        try:
            umount2(os.path.realpath(path / "rootfs"))
        except OSError as e:
            raise KernelError(f"cannot unmount {path}/rootfs", e.errno or 0) from e


def delete_bundle(path: Path) -> None:
    """Remove a bundle and what its container wrote; shared layers stay. Raises: ContainerError."""
    if not (path / MARK).is_file():
        raise ContainerError(f"{path} was not made by `runtime bundle create`", hint="remove it by hand")
    unmount(path)
    below = os.path.realpath(path) + "/"
    if mounts := [m.mount_point for m in read_mountinfo() if m.mount_point.startswith(below)]:
        raise ContainerError(f"there are mounts below {path}: {', '.join(mounts)}", hint="unmount them first")
    shutil.rmtree(path)


def _accounts(rootfs: Path) -> Accounts:
    root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return Accounts(_read_inside(root, "etc/passwd"), _read_inside(root, "etc/group"))
    finally:
        os.close(root)


def _read_inside(root: int, path: str) -> str:
    try:
        fd = openat2(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return ""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return os.read(fd, _MAX_ACCOUNTS_BYTES).decode(errors="replace")
    finally:
        os.close(fd)
