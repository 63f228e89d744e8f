"""Shared memory whose content was sent beforehand: left out of the images, and put into them again before a restore.

memory-shared.json   {"INODE": number, ...}: of these pagemap-shmem-INODE.img is there, and its pages-N.img is made of the passes
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.criu import pagemap
from runtime.criu.pagemap import PARENT, PRESENT
from runtime.criu.request import SHARED_FILE
from runtime.errors import ContainerError
from runtime.files import owners_alone, write_all
from runtime.memory import spans
from runtime.memory.passes import Passes
from runtime.memory.spans import Span


def leave_out(image_path: Path, sent: Mapping[int, tuple[int, Sequence[Span]]]) -> None:
    """Take out of the images what was sent: of each inode its number in the records, and its runs (offsets).

    What is not there as a whole stays as CRIU has written it. Raises: ContainerError for an image that is damaged, or in the way.
    """
    left_out: dict[int, int] = {}
    try:
        for inode, (number, runs) in sent.items():
            path = image_path / _image(inode)
            if not path.is_file():
                continue
            pages_id, entries = pagemap.load(path)
            wanted = spans.union((e.start, e.end) for e in entries)
            if any(e.flags & PARENT for e in entries) or spans.minus(wanted, spans.union((a, b) for a, b in runs)):
                continue
            left_out[inode] = number
            _pages(image_path, pages_id).unlink()
        if left_out:
            (image_path / SHARED_FILE).write_text(json.dumps(left_out))
    except OSError as e:
        raise ContainerError(f"cannot take shared memory out of the images in {image_path}: {e.strerror}") from e


def rebuild(image_path: Path, passes: Passes) -> None:
    """Make the files again that were left out. Idempotent.

    Raises: ContainerError when a pass is damaged, or something is in none of them.
    """
    for inode, number in _left_out(image_path).items():
        try:
            pages_id, entries = pagemap.load(image_path / _image(inode))
        except OSError as e:
            raise ContainerError(f"{image_path / _image(inode)}: {e.strerror}", hint="the images are not whole") from e
        path = _pages(image_path, pages_id)
        if path.exists():
            continue
        passes.look()
        wanted = [(e.start, e.end) for e in entries if e.flags & PRESENT]
        pieces = passes.pieces(number, wanted)
        if sum(end - start for start, end, _ in pieces) != spans.size(wanted):
            raise ContainerError(f"{image_path}: pages of shared memory {inode} are in no pass", hint="the images are not whole")
        new = path.with_name(path.name + ".new")
        try:
            with open(new, "wb", buffering=0, opener=owners_alone) as f:
                for start, end, content in pieces:
                    write_all(f.fileno(), memoryview((ctypes.c_char * (end - start)).from_address(content)).cast("B"))
            os.rename(new, path)
        except OSError as e:
            raise ContainerError(f"{path}: cannot be written: {e.strerror}", hint="free some space there") from e


def _left_out(image_path: Path) -> dict[int, int]:
    try:
        note = json.loads((image_path / SHARED_FILE).read_text())
        return {int(inode): int(number) for inode, number in note.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise ContainerError(f"{image_path / SHARED_FILE} cannot be read: {e}", hint="the images are not whole") from e


def _image(inode: int) -> str:
    return f"pagemap-shmem-{inode}.img"


def _pages(image_path: Path, pages_id: int) -> Path:
    return image_path / f"pages-{pages_id}.img"
