"""Write the content of processes' memory, as records, into a pipe or a file."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

from runtime.files import write_all
from runtime.linux.libc import libc
from runtime.linux.syscalls import SYSCALL
from runtime.memory.records import END, MAX_PAGES, MAX_REGIONS, PAGE_BYTES, Region, batches, head
from runtime.memory.spans import Span
from runtime.values import Value

BUFFER_BYTES = MAX_PAGES * PAGE_BYTES


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Sent(Value):
    """What went out. Units: `written_bytes` counts heads, too."""

    pages: int
    written_bytes: int


class Sender:
    """Writes records into a descriptor that it does not own."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = ctypes.create_string_buffer(BUFFER_BYTES)
        self._view = memoryview(self._buffer).cast("B")
        self._local = _IoVec(ctypes.addressof(self._buffer), 0)
        self._remote = (_IoVec * MAX_REGIONS)()
        self.pages = self.written_bytes = 0

    def send(self, pid: int, number: int, runs: Sequence[Span]) -> list[Span]:
        """Write what is in these runs of a process's memory now; return what could not be read: it is mapped no more.

        Raises: OSError: ESRCH when the process has ended, EPIPE when nobody reads.
        """
        missing: list[Span] = []
        for batch in batches(number, runs):
            if self._read(pid, batch):
                self._write(batch)
                continue
            # Something of it is gone, or is memory that the process itself may not read.
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                for region in batch:
                    for at in range(region.start, region.end, PAGE_BYTES):
                        if self._read_page(memory.fileno(), at):
                            self._write([Region(number, at, 1)])
                        else:
                            missing.append((at, at + PAGE_BYTES))
        return missing

    @property
    def buffer(self) -> memoryview:
        """What `send` reads into: BUFFER_BYTES that a caller may use between two calls."""
        return self._view

    def send_buffer(self, number: int, at: int, runs: Sequence[Span]) -> None:
        """Write these runs of a memory, of which the buffer has what is from `at` on. Raises: OSError."""
        for batch in batches(number, runs):
            write_all(self._fd, head(batch))
            for region in batch:
                write_all(self._fd, self._view[region.start - at : region.end - at])
            self._count(batch)

    def end(self) -> Sent:
        """End the pass. Raises: OSError. Returns what went out since the last one."""
        write_all(self._fd, END)
        sent = Sent(self.pages, self.written_bytes + len(END))
        self.pages = self.written_bytes = 0
        return sent

    def _read(self, pid: int, batch: Sequence[Region]) -> bool:
        for i, region in enumerate(batch):
            self._remote[i].base, self._remote[i].length = region.start, region.pages * PAGE_BYTES
        size = sum(r.pages for r in batch) * PAGE_BYTES
        self._local.length = size
        local, remote = ctypes.byref(self._local), ctypes.byref(self._remote)
        number, one, zero = ctypes.c_long(SYSCALL["process_vm_readv"]), ctypes.c_ulong(1), ctypes.c_ulong(0)
        got = libc.syscall(number, ctypes.c_long(pid), local, one, remote, ctypes.c_ulong(len(batch)), zero)
        if got < 0 and ctypes.get_errno() != errno.EFAULT:
            raise OSError(ctypes.get_errno(), f"cannot read the memory of process {pid}: {os.strerror(ctypes.get_errno())}")
        return bool(got == size)

    def _read_page(self, memory: int, at: int) -> bool:
        try:
            return os.preadv(memory, [self._view[:PAGE_BYTES]], at) == PAGE_BYTES
        except OSError as e:
            if e.errno == errno.EIO:
                return False
            raise

    def _write(self, batch: Sequence[Region]) -> None:
        write_all(self._fd, head(batch))
        write_all(self._fd, self._view[: sum(r.pages for r in batch) * PAGE_BYTES])
        self._count(batch)

    def _count(self, batch: Sequence[Region]) -> None:
        pages = sum(r.pages for r in batch)
        self.pages += pages
        self.written_bytes += (pages + 1) * PAGE_BYTES
