"""Image directories: who may read them, what they hold beside CRIU's files, and CRIU's statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.criu.request import NOTES_FILE, STDIO_FILE
from runtime.errors import KernelError, NotFound, SpecError

_STATS = (
    "freezing_time", "frozen_time", "memdump_time", "memwrite_time", "pages_scanned", "pages_written",
    "forking_time", "restore_time", "pages_restored",
)  # fmt: skip


def make(path: Path) -> None:
    """Make an image directory that only its owner can read: images hold the memory's secrets. Raises: KernelError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise KernelError(f"cannot make image directory {path}", e.errno or 0) from e


def require(path: Path) -> None:
    """Refuse a directory that holds no checkpoint. Raises: NotFound."""
    if not (path / "inventory.img").is_file():
        raise NotFound(f"no checkpoint in {path}: it has no inventory.img", hint="give the directory with --image-path")


def save_stdio(path: Path, names: tuple[str, ...]) -> None:
    """Keep what the container's descriptors 0-2 were, in the file that runc uses."""
    (path / STDIO_FILE).write_text(json.dumps(list(names)))


def load_stdio(path: Path) -> list[str]:
    """Return what `save_stdio` kept; an image directory without it has none. Raises: SpecError."""
    try:
        names = json.loads((path / STDIO_FILE).read_text())
    except FileNotFoundError:
        return []
    except ValueError as e:
        raise SpecError(f"{path / STDIO_FILE}: is not JSON: {e}") from e
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise SpecError(f"{path / STDIO_FILE}: is no list of names")
    return names[:3]


def save_notes(path: Path, notes: dict[str, str]) -> None:
    """Keep what a restore by this runtime must know beside CRIU's images."""
    (path / NOTES_FILE).write_text(json.dumps(notes))


def load_notes(path: Path) -> dict[str, str]:
    """Return what `save_notes` kept; images of another runtime have none."""
    try:
        notes = json.loads((path / NOTES_FILE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise SpecError(f"{path / NOTES_FILE}: is not JSON: {e}") from e
    return notes if isinstance(notes, dict) else {}


def stats(directory: Path, which: str) -> dict[str, int]:
    """Return CRIU's statistics of a `dump` or `restore`; empty when it wrote none.

    Units: times in microseconds.
    """
    from pycriu import images

    try:
        with (directory / f"stats-{which}").open("rb") as f:
            entry: dict[str, Any] = images.load(f)["entries"][0][which]
    except (OSError, KeyError, IndexError):
        return {}
    return {name: int(entry[name]) for name in _STATS if name in entry}
