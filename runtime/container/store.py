"""The state root: one directory for each container, its name the container's.

    ROOT/ID/state.json   what `State` holds, replaced atomically
    ROOT/ID/config.json  the bundle's config.json as it was at creation
    ROOT/ID/start.sock   while the first process waits for `start`

The directory is its own lock: whoever changes a container holds flock(2) on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime import files
from runtime.errors import AlreadyExists, ContainerError, KernelError, NotFound, SpecError
from runtime.spec import state as state_module
from runtime.spec.state import State

_ID = re.compile(r"[\w+.-]+", re.ASCII)


def default_root() -> Path:
    """Return where states are kept: /run for root, the user's runtime directory for others."""
    if os.geteuid() == 0:
        return Path("/run/ferry/runtime")
    if directory := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(directory) / "ferry" / "runtime"
    own = Path(f"/tmp/ferry-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        own.mkdir(mode=0o700)
    found = own.lstat()
    # Anybody can make that name first, and would then decide what our hooks are.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ContainerError(f"{own} is not this user's own directory", hint="set XDG_RUNTIME_DIR, or use --root")
    return own / "runtime"


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, container_id: str) -> Path:
        """Return a container's directory. Raises: SpecError for an id that is no name."""
        if not _ID.fullmatch(container_id) or container_id in (".", "..") or len(container_id) > 255:
            raise SpecError(f"container id {container_id!r} is not valid", hint="letters, digits and _+-. only, at most 255")
        return self.root / container_id

    def make(self, container_id: str) -> Path:
        """Make the directory of a new container. Raises: AlreadyExists, KernelError."""
        directory = self.directory(container_id)
        try:
            self.root.mkdir(mode=0o711, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700)
        except FileExistsError:
            raise AlreadyExists(f"container with id exists: {container_id}", hint="choose another id, or delete it") from None
        except OSError as e:
            raise KernelError(f"cannot make {directory}", e.errno or 0) from e
        return directory

    @contextlib.contextmanager
    def made(self, container_id: str) -> Iterator[Path]:
        """Make the directory of a new container and hold its lock. Raises: AlreadyExists, KernelError."""
        directory, entered = self.make(container_id), False
        try:
            with self.locked(container_id):
                entered = True
                yield directory
        except BaseException:
            if not entered:
                self.remove(container_id)
            raise

    @contextlib.contextmanager
    def locked(self, container_id: str) -> Iterator[None]:
        """Hold a container's lock; another verb on it waits. Raises: NotFound."""
        try:
            with files.locked_directory(self.directory(container_id)):
                yield
        except (FileNotFoundError, NotADirectoryError) as e:
            if e.filename is not None and Path(e.filename) != self.directory(container_id):
                raise
            raise self.missing(container_id) from None

    @staticmethod
    def missing(container_id: str) -> NotFound:
        return NotFound(f"container does not exist: {container_id}")

    def load(self, container_id: str) -> State:
        """Read a container's state. Raises: NotFound; ContainerError when it is damaged."""
        path = self.directory(container_id) / "state.json"
        try:
            return state_module.from_json(json.loads(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            raise self.missing(container_id) from None
        except (ValueError, RecursionError) as e:
            raise ContainerError(f"{path}: is not JSON: {e}") from e

    def save(self, state: State) -> None:
        """Replace a container's state. Raises: OSError."""
        files.save_json(self.directory(state.id) / "state.json", state_module.to_json(state))

    def save_config(self, container_id: str, document: dict[str, Any]) -> None:
        files.save_json(self.directory(container_id) / "config.json", document)

    def config_path(self, container_id: str) -> Path:
        return self.directory(container_id) / "config.json"

    def remove(self, container_id: str) -> None:
        """Remove all that is kept of a container. Idempotent."""
        directory = self.directory(container_id)
        # Renamed first: a half-removed state must not be found by its name.
        gone = directory.with_name(f".{container_id}.{os.getpid()}")
        try:
            directory.rename(gone)
        except FileNotFoundError:
            return
        _remove_tree(gone)

    def ids(self) -> list[str]:
        """Return the containers of this root, sorted."""
        try:
            return sorted(e.name for e in os.scandir(self.root) if e.is_dir() and not e.name.startswith("."))
        except FileNotFoundError:
            return []


def _remove_tree(directory: Path) -> None:
    """Remove a directory of ours and what is in it; what cannot be removed stays. (shutil costs 2 ms to import.)"""
    for base, directories, names in os.walk(directory, topdown=False):
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(base, name))
        for name in directories:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(base, name))
    with contextlib.suppress(OSError):
        os.rmdir(directory)
