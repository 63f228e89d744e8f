"""Give restored processes their memory: each page when it is touched, and all others meanwhile.

    CRIU ---- lazy-pages.socket ---> filler
     pid (int32), one byte with the userfaultfd        for each process; -1 instead of both for a zombie
     0x52535446                                        all are restored

From then on everything is filled in the order of addresses, and a page that a process waits for at once. A process may
change its mappings before it is whole: it waits until we know of that (the events of userfaultfd(2)).

Source: CRIU's criu/uffd.c, criu/include/uffd.h.
"""

from __future__ import annotations

import array
import bisect
import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from runtime.errors import ContainerError
from runtime.linux import userfaultfd
from runtime.memory.passes import Passes, Piece, clip, without
from runtime.memory.records import PAGE_BYTES
from runtime.memory.spans import Span, minus, size

_FINISHED = 0x52535446
_AT_ONCE_BYTES = 1 << 20
_AROUND_FAULT_BYTES = 64 << 10
_MEMORY_S = 30.0
_AGAIN_MS = 1


class _Process:
    """One userfaultfd, and what is still to be filled behind it: pieces, sorted, the next one last.

    The content of a piece is what was at an address of the process `number` when it was dumped.
    """

    def __init__(self, fd: int, number: int, pieces: list[Piece]) -> None:
        self.fd, self.number = fd, number
        self.pieces = pieces[::-1]
        self.waited_for: set[int] = set()  # addresses of pages

    def find(self, address: int) -> Piece | None:
        """Return the piece from a page on, if there is one."""
        at = bisect.bisect_left(self.pieces, -address, key=lambda p: -p[0])
        if at == len(self.pieces):
            return None
        start, end, content = self.pieces[at]
        return (address, end, content + address - start) if start <= address < end else None

    def drop(self, start: int, end: int) -> list[Piece]:
        """Take out a range; return what it had."""
        ordered = self.pieces[::-1]
        self.pieces = without(ordered, [(start, end, 0)])[::-1]
        return clip(ordered, [(start, end)])


class Filler:
    """Serves one restore. `wanted` tells which ranges of a process, by its number, are to be filled."""

    def __init__(self, listener: socket.socket, passes: Passes, wanted: Callable[[int], list[Span]]) -> None:
        self._listener, self._passes, self._wanted = listener, passes, wanted
        self._processes: dict[int, _Process] = {}
        self._poll = select.poll()
        self._client: socket.socket | None = None
        self._received, self._fds = b"", array.array("i")
        self._finished = False
        self._restored_s = 0.0
        self._pages = self._waited_for = 0

    def run(self) -> dict[str, Any]:
        """Go on until all memory is where it belongs. Raises: ContainerError, OSError: then it never will be.

        Returns how many pages there were, how often a process waited for one, and "seconds" from when all were restored.
        """
        self._client, _ = self._listener.accept()
        self._poll.register(self._client, select.POLLIN)
        while not self._finished or self._processes:
            # While somebody waits, or tells something, nothing else is done.
            ready = self._poll.poll(0 if self._finished else _AGAIN_MS if self._waiting() else None)
            for fd, _ in ready:
                if fd == self._client.fileno():
                    self._hear()
                elif fd in self._processes:
                    self._attend(self._processes[fd])
            for process in self._waiting():
                self._serve(process)
            if self._finished and not ready and self._processes:
                self._go_on(next(iter(self._processes.values())))
        return {"pages": self._pages, "waited_for": self._waited_for, "seconds": time.monotonic() - self._restored_s}

    def _waiting(self) -> list[_Process]:
        return [p for p in self._processes.values() if p.waited_for]

    def _hear(self) -> None:
        assert self._client is not None
        data, ancillary, _, _ = self._client.recvmsg(4096, socket.CMSG_SPACE(64 * 4))
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._fds.frombytes(content[: len(content) - len(content) % 4])
        if not data:
            self._poll.unregister(self._client)
            if not self._finished:
                raise ContainerError("the restore ended before all processes were there")
            return
        self._received += data
        while len(self._received) >= 4:
            (number,) = struct.unpack_from("<i", self._received)
            if number in (_FINISHED, -1):
                if number == _FINISHED and not self._finished:
                    self._finished, self._restored_s = True, time.monotonic()
                self._received = self._received[4:]
                continue
            if len(self._received) < 5 or not self._fds:
                return
            self._received = self._received[5:]
            self._take(number, self._fds.pop(0))

    def _take(self, number: int, fd: int) -> None:
        os.set_blocking(fd, False)
        spans = self._wanted(number)
        if missing := size(minus(spans, self._passes.covered(number))) // PAGE_BYTES:
            raise ContainerError(f"{missing} pages of process {number} are in no pass", hint="the images are not whole")
        self._pages += size(spans) // PAGE_BYTES
        self._add(_Process(fd, number, [(start, end, start) for start, end in spans]))

    def _add(self, process: _Process) -> None:
        self._processes[process.fd] = process
        self._poll.register(process.fd, select.POLLIN)

    def _end(self, process: _Process) -> None:
        """Let go of a process that is whole, or has ended: what it touches from now on is the kernel's. Idempotent."""
        if process.fd not in self._processes:
            return
        process.waited_for.clear()
        self._poll.unregister(process.fd)
        del self._processes[process.fd]
        os.close(process.fd)

    def _attend(self, process: _Process) -> None:
        try:
            for event, first, second, third in userfaultfd.messages(process.fd):
                if event == userfaultfd.EVENT_PAGEFAULT:
                    process.waited_for.add(second - second % PAGE_BYTES)
                elif event == userfaultfd.EVENT_FORK:
                    os.set_blocking(first, False)
                    self._add(_Process(first, process.number, process.pieces[::-1]))
                elif event == userfaultfd.EVENT_REMAP:
                    moved = process.drop(first, first + third)
                    process.drop(second, second + third)
                    shifted = [(a - first + second, b - first + second, c) for a, b, c in moved]
                    process.pieces = sorted(process.pieces + shifted, reverse=True)
                elif event in (userfaultfd.EVENT_REMOVE, userfaultfd.EVENT_UNMAP):
                    process.drop(first, second)
        except OSError as e:
            if e.errno != errno.ESRCH:
                raise
            self._end(process)

    def _serve(self, process: _Process) -> None:
        """Fill what a process waits for. What it is changing just now is tried again when it has told."""
        for address in list(process.waited_for):
            if process.fd not in self._processes:
                return
            found = process.find(address)
            if found is None:
                done = self._zero(process, address)
            else:
                done = self._copy(process, address, found[2], min(found[1] - address, _AROUND_FAULT_BYTES)) > 0
            if done:
                process.waited_for.discard(address)
                self._waited_for += 1

    def _zero(self, process: _Process, address: int) -> bool:
        try:
            userfaultfd.zero(process.fd, address, address + PAGE_BYTES)
        except FileExistsError:
            userfaultfd.wake(process.fd, address, address + PAGE_BYTES)
        except OSError as e:
            if e.errno == errno.EAGAIN:
                return False
            self._excuse(process, e)
        return True

    def _go_on(self, process: _Process) -> None:
        if not process.pieces:
            self._end(process)
            return
        start, end, origin = process.pieces.pop()
        done = self._copy(process, start, origin, min(end - start, _AT_ONCE_BYTES))
        if done < end - start and process.fd in self._processes:
            process.pieces.append((start + done, end, origin + done))

    def _copy(self, process: _Process, to: int, origin: int, length: int) -> int:
        """Fill a run of pages; return how far it is dealt with: filled, there already, or mapped no more."""
        at, most = 0, length
        content, until = 0, 0  # where the run goes on, and up to where it lies there
        deadline = time.monotonic() + _MEMORY_S
        while at < length:
            if at >= until:
                located = self._passes.locate(process.number, origin + at)
                if located is None:
                    raise ContainerError(f"a page of process {process.number} is in no pass", hint="the images are not whole")
                content, until = located[0] - at, located[1] - origin
            step = min(most, length - at, until - at)
            try:
                done = userfaultfd.copy(process.fd, to + at, content + at, step)
            except OSError as e:
                if e.errno == errno.ENOENT and step > PAGE_BYTES:
                    # It goes over the end of a mapping, though what follows may be mapped, too.
                    most = step // 2 // PAGE_BYTES * PAGE_BYTES
                    continue
                if e.errno == errno.EAGAIN:
                    return at  # what it does to its mappings is told first
                if e.errno == errno.ENOMEM and time.monotonic() < deadline:
                    time.sleep(0.01)
                    continue
                if not self._excuse(process, e):
                    return length
                at += PAGE_BYTES
                continue
            if not done:
                # Filled before somebody was told of its waiting.
                with contextlib.suppress(OSError):
                    userfaultfd.wake(process.fd, to + at, to + at + PAGE_BYTES)
                done = PAGE_BYTES
            at += done
            most *= 2
        return length

    def _excuse(self, process: _Process, error: OSError) -> bool:
        """Take what a process that ends, or unmaps, may cause; False when it has ended. Raises: OSError for all else."""
        if error.errno == errno.ESRCH:
            self._end(process)
            return False
        if error.errno == errno.ENOENT:
            return True
        raise error
