"""The layers that are kept on this host, by their digests, for the containers that have them.

    /var/lib/ferry/layers/DIGEST        a layer that another host sent; nothing in it is ever changed
    /var/lib/ferry/layers/.ID-N         one that is on its way, of the move ID
    /var/lib/ferry/layers/.used-NAME    which layers a container here has, while the directory exists that its own layer is in

What is kept stays for the next container that has it: `migrate layers` lists and removes it. The store's directory is its lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from migrate import layers, mounts, places
from migrate.durable import sync_directory
from migrate.errors import TransferFailed
from migrate.overlay import DIGEST, Overlay
from migrate.rootfs import DIRECTORY

_USED, _GONE = ".used-", ".gone-"


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Keep others from removing layers, and from looking which there are. Raises: OSError."""
    while True:
        places.LAYERS.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = -1
        try:
            fd = os.open(places.LAYERS, DIRECTORY)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_ino == places.LAYERS.stat().st_ino:
                break
        except FileNotFoundError:
            pass  # who had it has just found it empty
        if fd >= 0:
            os.close(fd)
    try:
        yield
    finally:
        os.close(fd)


def stored() -> dict[str, int]:
    """Return the layers that are kept here: how many bytes each has."""
    try:
        names = sorted(n for n in os.listdir(places.LAYERS) if DIGEST.fullmatch(n))
    except FileNotFoundError:
        return {}
    return {n: layers.size(places.LAYERS / n) for n in names}


def have(digests: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of these layers are kept here."""
    return tuple(d for d in dict.fromkeys(digests) if DIGEST.fullmatch(d) and (places.LAYERS / d).is_dir())


def keep(arrived: Path, expected: str) -> None:
    """Put a layer that has come into the store, when all of it is on disk.

    Raises: TransferFailed when it is not what it was said to be, or is written to still; OSError.
    """
    fd = os.open(arrived, DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise TransferFailed(f"the layer {expected} is written to still") from e
        found, _ = layers.digest(arrived)
        if found != expected:
            hint = "can this file system keep all attributes?"
            raise TransferFailed(f"a layer has come as another one: {found} and not {expected}", hint=hint)
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(arrived))
    finally:
        os.close(fd)
    try:
        arrived.rename(places.LAYERS / expected)
    except OSError:
        if not have((expected,)):
            raise
        shutil.rmtree(arrived)  # another move was faster
    sync_directory(places.LAYERS)


def use(directory: str, digests: tuple[str, ...]) -> None:
    """Note that a container has these layers, for as long as a directory exists. Raises: OSError."""
    path = _note_of(directory)
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as f:
        f.write(json.dumps({"directory": directory, "layers": list(digests)}))
        f.flush()
        os.fsync(f.fileno())
    new.rename(path)
    sync_directory(places.LAYERS)


def leave(directory: str) -> None:
    """Note that a container that had its own layer in a directory has left. Idempotent. Raises: OSError."""
    if not os.path.lexists(directory):
        _note_of(directory).unlink(missing_ok=True)


def _note_of(directory: str) -> Path:
    return places.LAYERS / f"{_USED}{hashlib.blake2b(directory.encode(), digest_size=10).hexdigest()}"


def in_use() -> set[str]:
    """Return the digests of the layers that containers here have, whether these are mounted now or not."""
    found = set()
    for mount in mounts.all_mounts():
        if mount.kind == "overlay":
            paths = [Path(layer.path) for layer in Overlay.read(mount.point, mount.options, {}).layers]
            found |= {path.name for path in paths if path.parent == places.LAYERS}
    for note in places.LAYERS.glob(f"{_USED}*"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads(note.read_text())
            if os.path.lexists(document["directory"]):
                found.update(map(str, document["layers"]))
            else:
                note.unlink()
    return found


def remove(digest: str) -> None:
    """Remove a layer, at once or not at all; called with the store locked. Idempotent."""
    gone = places.LAYERS / f"{_GONE}{digest}"
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        (places.LAYERS / digest).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep() -> None:
    """Remove what was left of layers that were being removed, and the store when it is empty; called with it locked."""
    for gone in places.LAYERS.glob(f"{_GONE}*"):
        shutil.rmtree(gone, ignore_errors=True)
    in_use()
    with contextlib.suppress(OSError):
        places.LAYERS.rmdir()
