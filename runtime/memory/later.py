"""Memory that follows its processes, which run elsewhere before all of it is there: here they stand still until it was sent.

    source                                   target
     memory-later.json ----- images ----------> which pages come later, by the number of their process
     memory-later.img ------------------------> records as of passes, in the order of addresses, what is asked for first
     <------------------- "page NUMBER ADDRESS" a process waits for it
     <--------------------------- "ack BYTES"   so much of the file was used
     <------------------------------ "enough"   nothing more is needed

Addresses are hexadecimal. What nobody asks for is sent only as far as WINDOW_BYTES ahead of what was used: what is asked for does
not wait behind more than that.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import ContainerError
from runtime.memory.records import MAX_PAGES, PAGE_BYTES, parse
from runtime.memory.sender import Sender, Sent
from runtime.memory.spans import Span, size

PAGES_FILE, CONTENT_FILE = "memory-later.json", "memory-later.img"
WORDS = ("page", "ack", "enough")
WINDOW_BYTES = 512 << 10
_CHUNK_BYTES, _AROUND_BYTES = 128 << 10, 32 << 10


def note(image_path: Path, pages: dict[int, list[Span]]) -> None:
    """Write down in the images which pages come later. Raises: OSError."""
    (image_path / PAGES_FILE).write_text(json.dumps(pages))


def noted(image_path: Path) -> dict[int, list[Span]] | None:
    """Return which pages come later, by the number of their process; None where none do. Raises: ContainerError."""
    try:
        document = json.loads((image_path / PAGES_FILE).read_text())
        return {int(number): [(int(a), int(b)) for a, b in spans] for number, spans in document.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise ContainerError(f"{image_path / PAGES_FILE} cannot be read: {e}", hint="the images are not whole") from e


class Server:
    """Sends what is `left` of processes that stand still, by their number: (pid, sorted runs). `fd` is its caller's."""

    def __init__(self, fd: int, left: dict[int, tuple[int, list[Span]]]) -> None:
        self._sender = Sender(fd)
        self._left = {number: (pid, list(runs)) for number, (pid, runs) in left.items() if runs}
        self._used_bytes = 0
        self._sent_bytes = 0
        self._enough = False

    @property
    def through(self) -> bool:
        """Say whether nothing is left to send."""
        return self._enough or not self._left

    @property
    def may_send(self) -> bool:
        """Say whether what nobody asks for may be sent now."""
        return not self.through and self._sent_bytes - self._used_bytes < WINDOW_BYTES

    def hear(self, word: str) -> None:
        """Take a word of the other side; a page that it asks for is sent at once. Raises: ContainerError; OSError."""
        name, *arguments = word.split()
        try:
            if name == "enough":
                self._enough = True
            elif name == "ack":
                (used,) = arguments
                self._used_bytes = int(used)
            elif name == "page":
                number, address = arguments
                self._send_around(int(number), int(address, 16))
            else:
                raise ValueError
        except ValueError as e:
            raise ContainerError(f"{word!r} says nothing of memory") from e

    def go_on(self) -> None:
        """Send the next of what is left. Raises: ContainerError; OSError."""
        number, (pid, runs) = next(iter(self._left.items()))
        batch: list[Span] = []
        room = _CHUNK_BYTES
        while room and len(batch) < len(runs):
            start, end = runs[len(batch)]
            batch.append((start, min(end, start + room)))
            room -= batch[-1][1] - start
        last = (batch[-1][1], runs[len(batch) - 1][1])
        runs[: len(batch)] = [last] if last[0] < last[1] else []
        self._write(number, pid, batch)

    def end(self) -> Sent:
        """Say that it is over; return what was sent. Raises: OSError."""
        return self._sender.end()

    def _send_around(self, number: int, address: int) -> None:
        if address % PAGE_BYTES:
            raise ValueError("no page begins there")
        _, runs = self._left.get(number, (0, []))
        at = bisect_right(runs, (address, 1 << 64)) - 1
        if at >= 0 and runs[at][0] <= address < runs[at][1]:  # otherwise it is on its way
            self._send(number, at, address, min(runs[at][1], address + _AROUND_BYTES))

    def _send(self, number: int, at: int, start: int, end: int) -> None:
        """Send a part of the run `at`. Raises: ContainerError, OSError."""
        pid, runs = self._left[number]
        before, after = (runs[at][0], start), (end, runs[at][1])
        runs[at : at + 1] = [run for run in (before, after) if run[0] < run[1]]
        self._write(number, pid, [(start, end)])

    def _write(self, number: int, pid: int, batch: list[Span]) -> None:
        if not self._left[number][1]:
            del self._left[number]
        if self._sender.send(pid, number, batch):
            raise ContainerError(f"memory of process {number} cannot be read")
        self._sent_bytes = self._sender.written_bytes


class Arrivals:
    """The other end: what has come of it so far. `requests` is a FIFO that leads to the Server.

    Raises (constructor): ContainerError when nobody reads there.
    """

    def __init__(self, image_path: Path, pages: dict[int, list[Span]], requests: Path) -> None:
        self._path, self._pages = image_path / CONTENT_FILE, pages
        self._file = -1
        self._at = self._told = 0
        self._buffer = ctypes.create_string_buffer(MAX_PAGES * PAGE_BYTES)
        self.through = False
        self.fd = -1
        try:
            self.fd = os.open(requests, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            if not self._is_whole():
                raise ContainerError(f"nobody can be asked for memory by {requests}: {e.strerror}") from e

    def _is_whole(self) -> bool:
        """Say whether all of it is here already."""
        with contextlib.suppress(OSError, ValueError), self._path.open("rb") as content:
            content.seek(-PAGE_BYTES, os.SEEK_END)
            return not parse(content.read(PAGE_BYTES))
        return False

    def of(self, number: int) -> list[Span]:
        """Return which pages of a process come later."""
        return self._pages.get(number, [])

    @property
    def pages(self) -> int:
        return sum(size(spans) for spans in self._pages.values()) // PAGE_BYTES

    def ask(self, number: int, address: int) -> bool:
        """Ask for a page; False when that has to be done again, since too much was asked for just now."""
        return self._say(f"page {number} {address:x}")

    def enough(self) -> None:
        """Say that nothing more is needed, to whoever is there still. Idempotent."""
        if self.fd >= 0:
            with contextlib.suppress(ContainerError):
                self._say("enough")
            os.close(self.fd)
            self.fd = -1
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _say(self, word: str) -> bool:
        if self.fd < 0:
            return True
        try:
            return os.write(self.fd, f"{word}\n".encode()) > 0
        except BlockingIOError:
            return False
        except BrokenPipeError as e:
            raise ContainerError("the host that has the rest of the memory is gone") from e

    def take(self) -> Iterator[tuple[int, int, int, int]]:
        """Give what has come since the last time: number of the process, start and end, where its content is in the file.

        Raises: ContainerError, OSError.
        """
        if self.through:
            return
        if self._file < 0:
            try:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
        there = os.fstat(self._file).st_size
        while there >= self._at + PAGE_BYTES:
            try:
                regions = parse(self._read(self._at, PAGE_BYTES))
            except ValueError as e:
                raise ContainerError(f"{self._path} is damaged at byte {self._at}: {e}") from e
            length = sum(r.pages for r in regions) * PAGE_BYTES
            if there < self._at + PAGE_BYTES + length:
                break
            self.through = not regions
            self._at += PAGE_BYTES
            for region in regions:
                yield region.pid, region.start, region.end, self._at
                self._at += region.pages * PAGE_BYTES
        if self._at > self._told and not self.through and self._say(f"ack {self._at}"):
            self._told = self._at

    def content(self, at: int, length: int) -> int:
        """Return where the content is that begins so far into the file, until the next call. Raises: ContainerError, OSError."""
        self._read(at, length)
        return ctypes.addressof(self._buffer)

    def _read(self, at: int, length: int) -> memoryview:
        if length > len(self._buffer):
            raise ContainerError(f"{self._path} is damaged at byte {at}: a record that is too long")
        view = memoryview(self._buffer).cast("B")[:length]
        if length and os.preadv(self._file, [view], at) != length:
            raise OSError(errno.EIO, "a file became shorter", str(self._path))
        return view
