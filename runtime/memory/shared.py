"""Memory that processes share and that is no file's: what changed in it is told by what it holds.

Who wrote to it need not be there any more, nor any protection that a write has taken away. So all of it is read each time, and
what differs from the last time is sent, out of the same buffer that was compared: it may change between two reads.

Nothing is kept open between two looks: memory that the container lets go of would stay charged to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from functools import cache

import xxhash

from runtime.linux.procfs import mappings
from runtime.memory import spans
from runtime.memory.records import PAGE_BYTES, SHARED
from runtime.memory.sender import BUFFER_BYTES, Sender
from runtime.memory.spans import Span

_BLOCK_BYTES = 4 * PAGE_BYTES

# Where shared memories, by inode, are mapped: process, and range of addresses as map_files names it.
Places = dict[int, list[tuple[int, str]]]


class Segment:
    """What is known of one shared memory. `number` is what its records call it, `sent` what the other side has (offsets)."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.sent: list[Span] = []
        self._digests: dict[int, bytes] = {}  # by the number of a block

    def send(self, fd: int, sender: Sender) -> None:
        """Send what is other than the last time. Raises: OSError."""
        buffer, sent = sender.buffer, []
        for start, end in _data(fd):
            for at in range(start, end, BUFFER_BYTES):
                size = _read(fd, buffer[: min(BUFFER_BYTES, end - at)], at)
                runs = self._changed(buffer[:size], at)
                sender.send_buffer(self.number, at, runs)
                sent += runs
        if sent:
            self.sent = spans.union([*self.sent, *sent])

    def _changed(self, content: memoryview, at: int) -> list[Span]:
        """Return the runs that differ, and take note of what is there now."""
        found: list[Span] = []
        for offset in range(0, len(content), _BLOCK_BYTES):
            digest = xxhash.xxh3_128_digest(content[offset : offset + _BLOCK_BYTES])
            number = (at + offset) // _BLOCK_BYTES
            if self._digests.get(number) != digest:
                self._digests[number] = digest
                found.append((at + offset, at + min(offset + _BLOCK_BYTES, len(content))))
        return spans.union(found)


class Shared:
    """All shared memory of a container, by the number of its inode."""

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self._count = 0

    def send(self, places: Places, sender: Sender) -> None:
        """Send what changed since the last time. Raises: OSError."""
        for inode, found in places.items():
            fd = next((fd for pid, place in found if (fd := _open(pid, inode, place)) is not None), None)
            if fd is not None:
                try:
                    self._segment(inode).send(fd, sender)
                finally:
                    os.close(fd)
        self.segments = {inode: segment for inode, segment in self.segments.items() if inode in places}

    def _segment(self, inode: int) -> Segment:
        if inode not in self.segments:
            self._count += 1
            self.segments[inode] = Segment(SHARED + self._count)
        return self.segments[inode]


def mapped(pids: Iterable[int]) -> Places:
    """Return the shared memories that processes have mapped now."""
    places: Places = {}
    for pid in pids:
        for inode, place in _mapped(pid):
            places.setdefault(inode, []).append((pid, place))
    return places


@cache
def _device() -> int:
    """Return the device of the file system in the kernel that all such memory is in, whatever name a process gives to it."""
    fd = os.memfd_create("device", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _mapped(pid: int) -> list[tuple[int, str]]:
    """Return the shared memories that a process has mapped: inode, and where, as map_files names it. None of one that ended."""
    device = f"{os.major(_device()):02x}:{os.minor(_device()):02x}"
    with contextlib.suppress(OSError):
        return [
            (inode, f"{start:x}-{end:x}")
            for start, end, permissions, _, place, inode, _ in mappings(pid)
            if permissions[3] == "s" and place == device
        ]
    return []


def _open(pid: int, inode: int, place: str) -> int | None:
    """Open what is mapped at a place; None when that is something else by now."""
    path = f"/proc/{pid}/map_files/{place}"
    try:
        st = os.stat(path)
        if (st.st_dev, st.st_ino) != (_device(), inode):
            return None
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    st = os.fstat(fd)
    if (st.st_dev, st.st_ino) == (_device(), inode):
        return fd
    os.close(fd)
    return None


def _read(fd: int, buffer: memoryview, at: int) -> int:
    """Read from an offset on; return how much there is, as whole pages."""
    got = 0
    while got < len(buffer) and (count := os.preadv(fd, [buffer[got:]], at + got)):
        got += count
    whole = -(-got // PAGE_BYTES) * PAGE_BYTES
    buffer[got:whole] = bytes(whole - got)
    return whole


def _data(fd: int) -> Iterator[Span]:
    """Give the runs of blocks in which there is something."""
    size, at = os.fstat(fd).st_size, 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError:  # ENXIO: only a hole is left
            return
        start = max(start // _BLOCK_BYTES * _BLOCK_BYTES, at)
        at = -(-end // _BLOCK_BYTES) * _BLOCK_BYTES
        yield start, at
