"""A directory that a move makes on its target, and removes again when the move is undone: never one that was there before."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from migrate import mounts
from migrate.errors import TransferFailed


@dataclass(slots=True)
class Made:
    """`parents` were not there either, the innermost first. `inode` tells it from what others make; None before it is there."""

    path: str
    parents: tuple[str, ...]
    inode: int | None = None

    @classmethod
    def planned(cls, path: Path) -> Self:
        """Look what has to be made for a path; make nothing."""
        parents = []
        parent = path.parent
        while not parent.exists():
            parents.append(str(parent))
            parent = parent.parent
        return cls(str(path), tuple(parents))

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Read a note. Raises: KeyError, TypeError."""
        return cls(str(document["path"]), tuple(map(str, document["parents"])), document["inode"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def make(self) -> None:
        """Raises: OSError, also when it is there already."""
        for parent in reversed(self.parents):
            with contextlib.suppress(FileExistsError):  # another one's, too
                os.mkdir(parent, 0o700)  # nobody else gets at what was perhaps kept from them on the source
        os.mkdir(self.path, 0o700)
        self.inode = os.lstat(self.path).st_ino

    def remove(self) -> None:
        """Remove it with all that is in it, and the parents that are empty then. Idempotent. Raises: TransferFailed."""
        path = Path(self.path)
        with contextlib.suppress(FileNotFoundError):
            if self.inode is None:
                with contextlib.suppress(OSError):
                    path.rmdir()  # made, but not noted: it can only be empty
            elif path.lstat().st_ino == self.inode:
                if inside := mounts.below(path):
                    raise TransferFailed(f"{path} is kept: {inside[0]} is mounted in it", hint="remove it by hand")
                shutil.rmtree(path, ignore_errors=True)
                if path.exists():
                    raise TransferFailed(f"cannot remove {path}", hint="remove it by hand")
        for parent in self.parents:
            with contextlib.suppress(OSError):
                os.rmdir(parent)
