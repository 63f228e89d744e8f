"""Memory that processes share and that is no file's: what changed in it is told by what it holds.

Who wrote to it need not be there any more, nor any protection that a write has taken away. So all of it is read each time, and
what differs from the last time is sent, out of the same buffer that was compared: it may change between two reads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import xxhash

from runtime.linux.procfs import lines, read
from runtime.memory import spans
from runtime.memory.records import PAGE_BYTES, SHARED
from runtime.memory.sender import BUFFER_BYTES, Sender
from runtime.memory.spans import Span

_BLOCK_BYTES = 4 * PAGE_BYTES
_DIGEST_BYTES = 16
# Anonymous shared mappings, System V's, and memory of memfd_create(2): files of one file system inside the kernel.
_NAMES = ("/dev/zero (deleted)", "/SYSV", "/memfd:")


class Segment:
    """One shared memory, open. `number` is what its records call it, `sent` the runs that the other side has (offsets)."""

    def __init__(self, fd: int, number: int) -> None:
        self._fd, self.number = fd, number
        self._digests = bytearray()
        self.sent: list[Span] = []

    def close(self) -> None:
        os.close(self._fd)

    def send(self, sender: Sender) -> None:
        """Send what is other than the last time. Raises: OSError."""
        buffer = sender.buffer
        for start, end in self._data():
            for at in range(start, end, BUFFER_BYTES):
                size = self._read(buffer[: min(BUFFER_BYTES, end - at)], at)
                runs = self._changed(buffer[:size], at)
                sender.send_buffer(self.number, at, runs)
                self.sent = spans.union([*self.sent, *runs])

    def _read(self, buffer: memoryview, at: int) -> int:
        """Read from an offset on; return how much there is, as whole pages."""
        got = 0
        while got < len(buffer) and (count := os.preadv(self._fd, [buffer[got:]], at + got)):
            got += count
        whole = -(-got // PAGE_BYTES) * PAGE_BYTES
        buffer[got:whole] = bytes(whole - got)
        return whole

    def _changed(self, content: memoryview, at: int) -> list[Span]:
        """Return the runs that differ, and take note of what is there now."""
        missing = (at + len(content)) // _BLOCK_BYTES * _DIGEST_BYTES + _DIGEST_BYTES - len(self._digests)
        self._digests += bytes(max(missing, 0))
        found: list[Span] = []
        for offset in range(0, len(content), _BLOCK_BYTES):
            digest = xxhash.xxh3_128_digest(content[offset : offset + _BLOCK_BYTES])
            place = (at + offset) // _BLOCK_BYTES * _DIGEST_BYTES
            if self._digests[place : place + _DIGEST_BYTES] != digest:
                self._digests[place : place + _DIGEST_BYTES] = digest
                found.append((at + offset, at + min(offset + _BLOCK_BYTES, len(content))))
        return spans.union(found)

    def _data(self) -> Iterator[Span]:
        """Give the runs of blocks in which there is something."""
        size, at = os.fstat(self._fd).st_size, 0
        while at < size:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                end = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError:  # ENXIO: only a hole is left
                return
            start = max(start // _BLOCK_BYTES * _BLOCK_BYTES, at)
            at = -(-end // _BLOCK_BYTES) * _BLOCK_BYTES
            yield start, at


class Shared:
    """All shared memory of a container, by the number of its inode."""

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self._count = 0

    def refresh(self, pids: Iterable[int]) -> None:
        """Follow what these processes have mapped now, and nothing else."""
        found: set[int] = set()
        for pid in pids:
            with contextlib.suppress(OSError):
                for inode, place in _mapped(pid):
                    found.add(inode)
                    if inode not in self.segments:
                        self._open(pid, inode, place)
        for inode in self.segments.keys() - found:
            self.segments.pop(inode).close()

    def _open(self, pid: int, inode: int, place: str) -> None:
        fd = os.open(f"/proc/{pid}/map_files/{place}", os.O_RDONLY | os.O_CLOEXEC)
        st = os.fstat(fd)
        # Unmapped meanwhile, and something else is there; or huge pages, which CRIU keeps otherwise.
        if st.st_ino != inode or st.st_blksize != PAGE_BYTES:
            os.close(fd)
            return
        self._count += 1
        self.segments[inode] = Segment(fd, SHARED + self._count)

    def send(self, sender: Sender) -> None:
        """Send what changed since the last time. Raises: OSError."""
        for segment in self.segments.values():
            segment.send(sender)

    def close(self) -> None:
        """Follow nothing any more. Idempotent."""
        for inode in list(self.segments):
            self.segments.pop(inode).close()


def _mapped(pid: int) -> Iterator[tuple[int, str]]:
    """Give the shared memories that a process has mapped: inode, and where, as map_files names it. Raises: OSError."""
    for line in lines(read(f"/proc/{pid}/maps")):
        fields = line.split(None, 5)
        if fields[1][3] == "s" and len(fields) > 5 and fields[5].startswith(_NAMES):
            start, end = (int(n, 16) for n in fields[0].split("-"))
            yield int(fields[4]), f"{start:x}-{end:x}"
