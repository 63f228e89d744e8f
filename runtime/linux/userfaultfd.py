"""Page faults in our hands: userfaultfd(2), and the search for changed pages that builds on it, PAGEMAP_SCAN."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from runtime.linux.libc import libc
from runtime.linux.syscalls import SYSCALL

SYSCALL_NUMBER = SYSCALL["userfaultfd"]
USER_MODE_ONLY = 1
NAME = "anon_inode:[userfaultfd]"

WP_ASYNC = 1 << 15
EVENT_PAGEFAULT, EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
_API = 0xAA
_MODE_WP = 2
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
_UFFDIO_WAKE, _UFFDIO_COPY, _UFFDIO_ZEROPAGE = 0x8010AA02, 0xC028AA03, 0xC020AA04
_MESSAGE_BYTES = 32

# Categories of pages. Source: linux/fs.h.
WRITTEN, PRESENT, SWAPPED, ZERO = 1 << 1, 1 << 3, 1 << 4, 1 << 5
_PAGEMAP_SCAN = 0xC0606610
_PROTECT, _REQUIRE_ASYNC = 1, 2
_REGIONS = 8192
_REGION = struct.Struct("=QQQ")


def api(fd: int, features: int) -> None:
    """Say what is wanted of a new userfaultfd. Raises: OSError (EINVAL where the kernel lacks a feature)."""
    fcntl.ioctl(fd, _UFFDIO_API, bytearray(struct.pack("=QQQ", _API, features, 0)))


def protect(fd: int, start: int, end: int) -> None:
    """Have writes to a range noticed. Idempotent. Raises: OSError (EBUSY when another one has the range)."""
    fcntl.ioctl(fd, _UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", start, end - start, _MODE_WP, 0)))


def unregister(fd: int, start: int, end: int) -> None:
    """Let go of a range. Raises: OSError."""
    fcntl.ioctl(fd, _UFFDIO_UNREGISTER, struct.pack("=QQ", start, end - start))


def wake(fd: int, start: int, end: int) -> None:
    """Let those who wait for pages of a range look again. Raises: OSError."""
    fcntl.ioctl(fd, _UFFDIO_WAKE, struct.pack("=QQ", start, end - start))


def copy(fd: int, to: int, address: int, size: int) -> int:
    """Fill missing pages from our own memory at `address`; return how many bytes were filled, 0 when there was one already.

    Raises: OSError: EAGAIN while the process changes its mappings (what it did is to be read first), ENOENT for what does not
    lie in one mapping, or in none, EFAULT when our own memory cannot be read, ESRCH when the process has ended.
    """
    arguments = bytearray(struct.pack("=QQQQq", to, address, size, 0, 0))
    try:
        fcntl.ioctl(fd, _UFFDIO_COPY, arguments)
    except OSError as e:
        (done,) = struct.unpack_from("=q", arguments, 32)
        if done > 0:
            return int(done)
        if e.errno == errno.EEXIST or done == -errno.EEXIST:
            return 0
        raise
    return size


def zero(fd: int, start: int, end: int) -> None:
    """Fill missing pages with zeros. Raises: OSError, as `copy`."""
    fcntl.ioctl(fd, _UFFDIO_ZEROPAGE, bytearray(struct.pack("=QQQq", start, end - start, 0, 0)))


def messages(fd: int) -> Iterator[tuple[int, int, int, int]]:
    """Read what has happened, from a descriptor that does not block: (event, three values of it). Raises: OSError."""
    while True:
        try:
            data = os.read(fd, 64 * _MESSAGE_BYTES)
        except BlockingIOError:
            return
        for at in range(0, len(data), _MESSAGE_BYTES):
            event = data[at]
            first, second, third = struct.unpack_from("=QQQ", data, at + 8)
            if event == EVENT_FORK:
                first &= 0xFFFFFFFF
            yield event, first, second, third
        if len(data) < 64 * _MESSAGE_BYTES:
            return


class _Scan(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in [
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        ]
    )


class PageScan:
    """Searches the pages of one process, through its open /proc/PID/pagemap.

    Source: the kernel's Documentation/admin-guide/mm/pagemap.rst.
    """

    def __init__(self, pagemap_fd: int) -> None:
        self._fd = pagemap_fd
        self._found = ctypes.create_string_buffer(_REGIONS * _REGION.size)

    def take_written(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the runs of filled pages that were written to, and have the next write to each noticed, in one step.

        Raises: OSError (EPERM where `protect` was not called).
        """
        found: list[tuple[int, int]] = []
        while start < end:
            # Written to, and not the kernel's page of zeros; there, or in swap.
            scan = _Scan(
                ctypes.sizeof(_Scan), _PROTECT | _REQUIRE_ASYNC, start, end, 0, ctypes.addressof(self._found), _REGIONS, 0,
                ZERO, WRITTEN | ZERO, PRESENT | SWAPPED, WRITTEN,
            )  # fmt: skip
            count = libc.ioctl(self._fd, ctypes.c_ulong(_PAGEMAP_SCAN), ctypes.byref(scan))
            if count < 0:
                number = ctypes.get_errno()
                raise OSError(number, f"PAGEMAP_SCAN: {os.strerror(number)}")
            found += [(a, b) for a, b, _ in _REGION.iter_unpack(memoryview(self._found)[: count * _REGION.size])]
            if scan.walk_end <= start:
                raise OSError(errno.EIO, "PAGEMAP_SCAN does not get on")
            start = scan.walk_end
        return found
