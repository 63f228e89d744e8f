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
from runtime.memory.later import Arrivals
from runtime.memory.passes import Passes, Piece, clip, without
from runtime.memory.records import PAGE_BYTES
from runtime.memory.spans import Span, minus, size

_FINISHED = 0x52535446
_AT_ONCE_BYTES = 1 << 20
_AROUND_FAULT_BYTES = 64 << 10
_MEMORY_S = 30.0
_AGAIN_MS = 1


class _Pieces:
    """What is to be filled, sorted, without overlaps. The content of a piece is what was at an address when it was dumped."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._reversed = pieces[::-1]  # the next one last

    def __bool__(self) -> bool:
        return bool(self._reversed)

    def copy(self) -> _Pieces:
        return _Pieces(self._reversed[::-1])

    def find(self, address: int) -> Piece | None:
        """Return the piece from a page on, if there is one."""
        at = bisect.bisect_left(self._reversed, -address, key=lambda p: -p[0])
        if at == len(self._reversed):
            return None
        start, end, content = self._reversed[at]
        return (address, end, content + address - start) if start <= address < end else None

    def within(self, start: int, end: int) -> list[Piece]:
        """Return what there is of a range."""
        first = bisect.bisect_left(self._reversed, -end, key=lambda p: -p[0] - 1)
        last = bisect.bisect_left(self._reversed, -start, key=lambda p: -p[0])
        return clip(self._reversed[first : last + 1][::-1], [(start, end)])

    def of_content(self, start: int, end: int) -> list[Piece]:
        """Return what has its content in a range, wherever it is now."""
        found = []
        for first, last, content in reversed(self._reversed):
            low, high = max(content, start), min(content + last - first, end)
            if low < high:
                found.append((first + low - content, first + high - content, low))
        return found

    def drop(self, start: int, end: int) -> list[Piece]:
        """Take out a range; return what it had."""
        found = self.within(start, end)
        if found:
            first = bisect.bisect_left(self._reversed, -end, key=lambda p: -p[0] - 1)
            last = bisect.bisect_left(self._reversed, -start, key=lambda p: -p[0])
            concerned = self._reversed[first : last + 1][::-1]
            self._reversed[first : last + 1] = without(concerned, [(start, end, 0)])[::-1]
        return found

    def add(self, pieces: list[Piece]) -> None:
        """Put pieces in where there are none."""
        self._reversed = sorted(self._reversed + pieces, reverse=True)

    def pop(self) -> Piece:
        return self._reversed.pop()

    def push(self, piece: Piece) -> None:
        """Put back the rest of what was popped last."""
        self._reversed.append(piece)


class _Process:
    """One userfaultfd, and what is still to be filled behind it: what is `here`, and what comes `later`.

    `number` is that of the process whose memory it was when it was dumped.
    """

    def __init__(self, fd: int, number: int, here: _Pieces, later: _Pieces, has_moved: bool = False) -> None:
        self.fd, self.number, self.here, self.later = fd, number, here, later
        self.has_moved = has_moved  # something of it is not where it was when it was dumped
        self.waited_for: set[int] = set()  # addresses of pages
        self.asked_for: set[int] = set()

    def forked(self, fd: int) -> _Process:
        return _Process(fd, self.number, self.here.copy(), self.later.copy(), self.has_moved)

    def lacks(self, start: int, end: int) -> list[Piece]:
        """Return what comes later of what was at a range when it was dumped."""
        return self.later.of_content(start, end) if self.has_moved else self.later.within(start, end)

    def drop(self, start: int, end: int) -> None:
        for pieces in (self.here, self.later):
            pieces.drop(start, end)

    def move(self, start: int, to: int, length: int) -> None:
        for pieces in (self.here, self.later):
            moved = pieces.drop(start, start + length)
            pieces.drop(to, to + length)
            pieces.add([(a - start + to, b - start + to, content) for a, b, content in moved])
        self.has_moved = True


class Filler:
    """Serves one restore. `wanted` tells which ranges of a process, by its number, are to be filled; some may come `later`."""

    def __init__(
        self, listener: socket.socket, passes: Passes, wanted: Callable[[int], list[Span]], later: Arrivals | None = None
    ) -> None:
        self._listener, self._passes, self._wanted, self._later = listener, passes, wanted, later
        self._processes: dict[int, _Process] = {}
        self._poll = select.poll()
        self._client: socket.socket | None = None
        self._received, self._fds = b"", array.array("i")
        self._finished = False
        self._restored_s = 0.0
        self._pages = self._waited_for = 0
        self._arrived: list[tuple[int, int, int, int]] = []

    def run(self) -> dict[str, Any]:
        """Go on until all memory is where it belongs. Raises: ContainerError, OSError: then it never will be.

        Returns how many pages there were, how often a process waited for one, and "seconds" from when all were restored.
        """
        self._client, _ = self._listener.accept()
        self._poll.register(self._client, select.POLLIN)
        if self._later is not None and self._later.fd >= 0:
            self._poll.register(self._later.fd, 0)  # that its other end was closed is told all the same
        while not self._finished or self._processes:
            # While somebody waits, or tells something, nothing else is done.
            busy = next((p for p in self._processes.values() if p.here), None) if self._finished else None
            ready = self._poll.poll(0 if busy else _AGAIN_MS if self._later is not None or self._waiting() else None)
            for fd, _ in ready:
                if fd == self._client.fileno():
                    self._hear()
                elif fd in self._processes:
                    self._attend(self._processes[fd])
                elif self._later is not None:
                    self._arrived += self._later.take()
                    if not self._later.through:
                        raise ContainerError("the host that has the rest of the memory is gone")
            for process in self._waiting():
                self._serve(process)
            if self._later is not None:
                self._take_later(self._later)
            if busy and busy.here and not ready and busy.fd in self._processes:
                self._go_on(busy)
            if self._finished:
                for process in [p for p in self._processes.values() if not p.here and not p.later]:
                    self._end(process)
        told = {"pages": self._pages, "waited_for": self._waited_for, "seconds": time.monotonic() - self._restored_s}
        if self._later is None:
            return told
        self._later.enough()
        return {**told, "later_pages": self._later.pages}

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
        later = self._later.of(number) if self._later is not None else []
        here = minus(spans, later)
        if missing := size(minus(here, self._passes.covered(number))) // PAGE_BYTES:
            raise ContainerError(f"{missing} pages of process {number} are in no pass", hint="the images are not whole")
        self._pages += size(spans) // PAGE_BYTES
        pieces, rest = ([(start, end, start) for start, end in of] for of in (here, later))
        self._add(_Process(fd, number, _Pieces(pieces), _Pieces(rest)))

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
                    self._add(process.forked(first))
                elif event == userfaultfd.EVENT_REMAP:
                    process.move(first, second, third)
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
            if (found := process.here.find(address)) is not None:
                done = self._copy(process, address, found[2], min(found[1] - address, _AROUND_FAULT_BYTES)) > 0
            elif (missing := process.later.find(address)) is not None:
                done = self._serve_later(process, address, missing[2])
            else:
                done = self._zero(process, address)
            if done:
                process.waited_for.discard(address)
                self._waited_for += 1

    def _serve_later(self, process: _Process, address: int, origin: int) -> bool:
        """Fill a page with what has come already; ask for it where it has not."""
        assert self._later is not None
        for number, start, end, at in self._arrived:
            if number == process.number and start <= origin < end:
                content = self._later.content(at + origin - start, PAGE_BYTES)
                done = self._copy(process, address, origin, PAGE_BYTES, content)
                process.later.drop(address, address + done)
                return done > 0
        if address not in process.asked_for and self._later.ask(process.number, origin):
            process.asked_for.add(address)
        return False

    def _take_later(self, later: Arrivals) -> None:
        """Put what has come since the last time where it belongs. Raises: ContainerError when more should have come; OSError."""
        self._arrived += later.take()
        if not self._finished:
            return  # what is not mapped yet could not be told from what is mapped no more
        for number, start, end, at in self._arrived:
            content = later.content(at, end - start)
            # One that forks meanwhile leaves a child that lacks it, too.
            while lacking := [p for p in self._processes.values() if p.number == number and p.lacks(start, end)]:
                for process in lacking:
                    self._put(process, start, end, content)
        self._arrived.clear()
        if not later.through:
            return
        if any(p.later for p in self._processes.values()):
            raise ContainerError("the memory that came later is not all that there was", hint="the images are not whole")
        # Nobody is needed any more: what is here is filled in also when the other host goes.
        if later.fd >= 0:
            self._poll.unregister(later.fd)
            later.enough()

    def _put(self, process: _Process, start: int, end: int, content: int) -> None:
        """Fill what was at a range, wherever a process has it by now."""
        while process.fd in self._processes:
            pieces = process.lacks(start, end)
            if not pieces:
                return
            first, last, origin = pieces[0]
            done = self._copy(process, first, origin, last - first, content + origin - start)
            process.later.drop(first, first + done)
            for address in [a for a in process.waited_for if first <= a < first + done]:
                process.waited_for.discard(address)
                self._waited_for += 1
            if done < last - first and process.fd in self._processes:
                self._attend(process)  # it changes its mappings: it tells how, and then goes on

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
        start, end, origin = process.here.pop()
        done = self._copy(process, start, origin, min(end - start, _AT_ONCE_BYTES))
        if done < end - start and process.fd in self._processes:
            process.here.push((start + done, end, origin + done))

    def _copy(self, process: _Process, to: int, origin: int, length: int, content: int | None = None) -> int:
        """Fill a run of pages, of which the passes have the content unless it is given.

        Return how far it is dealt with: filled, there already, or mapped no more.
        """
        at, most = 0, length
        content, until = (0, 0) if content is None else (content, length)  # where the run goes on, up to where it lies there
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
