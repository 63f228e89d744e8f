"""The memory in an image directory: of each process, which page lies where in the passes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

from runtime.linux.libc import punch_hole
from runtime.memory import records
from runtime.memory.records import MAX_ADDRESS
from runtime.memory.spans import Span, minus, union

# Start and end of a run of pages, and where its content lies: for Passes an address in our own memory.
Piece = tuple[int, int, int]


def present(directory: Path) -> bool:
    """Say whether an image directory has memory of this kind. Raises: OSError."""
    return bool(records.files(directory))


def clip(pieces: Iterable[Piece], spans: Sequence[Span]) -> list[Piece]:
    """Return what of pieces lies in spans; both are sorted. Pure."""
    found: list[Piece] = []
    i = 0
    for start, end, content in pieces:
        while i < len(spans) and spans[i][1] <= start:
            i += 1
        k = i
        while k < len(spans) and spans[k][0] < end:
            first, last = max(start, spans[k][0]), min(end, spans[k][1])
            found.append((first, last, content + first - start))
            k += 1
    return found


def without(pieces: Sequence[Piece], taken: Sequence[Piece]) -> list[Piece]:
    """Return what of pieces lies outside of others; both are sorted and do not overlap in themselves. Pure."""
    return clip(pieces, minus([p[:2] for p in pieces], [t[:2] for t in taken]))


def layers(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Sort pieces, which come in the order in which they were written, into layers that do not overlap, the newest last. Pure."""
    found: list[list[Piece]] = []
    layer: list[Piece] = []
    for piece in pieces:
        # Of one process they come by address: one that lies before the last has come a second time.
        if layer and piece[0] < layer[-1][1]:
            found.append(layer)
            layer = []
        layer.append(piece)
    if layer:
        found.append(layer)
    return found


class Passes:
    """What `directory` holds. Raises: ContainerError from `look` for a pass that is damaged or not whole.

    `look` may be called while passes arrive, of which those that were there are not read again. To bring a pass together with
    those before it takes time for each of their pieces: that is done while nobody waits, and not for what is only looked up.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: set[str] = set()
        self._maps: list[tuple[int, int, Path, mmap.mmap]] = []  # where each lies in our own memory
        self._layers: dict[int, list[list[Piece]]] = {}  # the newest last
        self._covered: dict[int, list[Span]] = {}

    def look(self, *, but_last: bool = False) -> None:
        """Take up the passes that are new; with `but_last` not the last one, which may still be under way."""
        for path in records.files(self._directory)[: -1 if but_last else None]:
            if path.name not in self._seen:
                self._take(path)
                self._seen.add(path.name)

    def _take(self, path: Path) -> None:
        content, regions = records.read(path)
        base = ctypes.addressof(ctypes.c_char.from_buffer(content))
        self._maps.append((base, base + len(content), path, content))
        new: dict[int, list[Piece]] = {}
        for region, offset in regions:
            new.setdefault(region.pid, []).append((region.start, region.end, base + offset))
        for pid, pieces in new.items():
            self._layers.setdefault(pid, []).extend(layers(_joined(pieces)))
            self._covered[pid] = union([*self._covered.get(pid, []), *(p[:2] for p in pieces)])

    def bring_together(self, *, free: bool = False) -> None:
        """Make one layer of each process's, so that less is to be looked at for an address.

        With `free` what newer passes have is taken out of the files of older ones, where their file system can do that.
        """
        for found in self._layers.values():
            while len(found) > 1:
                newer = found.pop(1)
                old = clip(found[0], [p[:2] for p in newer])
                found[0] = sorted(newer + without(found[0], newer))
                if free:
                    with contextlib.suppress(OSError):
                        self._free(old)

    def _free(self, pieces: Sequence[Piece]) -> None:
        holes = union((content, content + end - start) for start, end, content in pieces)
        for base, behind, path, _ in self._maps:
            inside = [(max(start, base), min(end, behind)) for start, end in holes if start < behind and end > base]
            if inside:
                fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    for start, end in inside:
                        punch_hole(fd, start - base, end - start)
                finally:
                    os.close(fd)

    def forget(self) -> None:
        """Remove the passes from their directory; those who have them open read on. Idempotent. Raises: OSError."""
        for path in records.files(self._directory):
            path.unlink(missing_ok=True)

    def covered(self, pid: int) -> list[Span]:
        """Return the ranges of a process that there is content of."""
        return self._covered.get(pid, [])

    def pieces(self, pid: int, spans: Sequence[Span]) -> list[Piece]:
        """Return what there is of these ranges of a process, sorted."""
        found: list[Piece] = []
        for start, end, _ in clip([(a, b, 0) for a, b in self.covered(pid)], spans):
            while start < end and (located := self.locate(pid, start)) is not None:
                behind = min(located[1], end)
                found.append((start, behind, located[0]))
                start = behind
        return found

    def locate(self, pid: int, address: int) -> tuple[int, int] | None:
        """Return where the content of an address is, and up to which address it goes on there; None where there is none."""
        limit = MAX_ADDRESS
        for layer in reversed(self._layers.get(pid, [])):
            at = bisect_right(layer, (address, MAX_ADDRESS + 1, 0))
            if at and layer[at - 1][1] > address:
                start, end, content = layer[at - 1]
                return content + address - start, min(end, limit)
            if at < len(layer):
                limit = min(limit, layer[at][0])
        return None


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join what follows each other both in the process and here."""
    joined: list[Piece] = []
    for start, end, content in pieces:
        if joined and joined[-1][1] == start and joined[-1][2] + start - joined[-1][0] == content:
            start, content = joined[-1][0], joined[-1][2]
            joined.pop()
        joined.append((start, end, content))
    return joined
