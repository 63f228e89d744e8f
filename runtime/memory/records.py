"""The format in which memory travels, and lies in an image directory as memory-N.img, N counting the passes from 1.

    record    one page of head, then the content of its regions' pages, one after the other
    head      "<8sIIQ": magic, version, number of regions, number of pages;
              then for each region "<QII": address, pages, number of the process in its pid namespace;
              from SHARED on the number is that of a memory that processes share, and the address an offset in it
    end       a head without regions: without it a file is not whole

A page may come several times: the last one counts, of the passes and within a pass. Pure, but for `read`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime.errors import ContainerError
from runtime.values import Value

PAGE_BYTES = 4096
_MAGIC = b"FERRYMEM"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQ")
_REGION = struct.Struct("<QII")
MAX_REGIONS = (PAGE_BYTES - _HEAD.size) // _REGION.size
MAX_PAGES = 1024
MAX_ADDRESS = 1 << 57
SHARED = 1 << 31


class Region(Value):
    """A run of pages of one process, or of one shared memory. Units: `start` is an address in bytes."""

    pid: int
    start: int
    pages: int

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE_BYTES


def head(regions: Sequence[Region]) -> bytes:
    """Return the head of a record; of the end when there are no regions."""
    packed = b"".join(_REGION.pack(r.start, r.pages, r.pid) for r in regions)
    return (_HEAD.pack(_MAGIC, _VERSION, len(regions), sum(r.pages for r in regions)) + packed).ljust(PAGE_BYTES, b"\0")


END = head(())


def parse(data: bytes | memoryview) -> list[Region]:
    """Read a head; none are the end. Raises: ValueError for what is none."""
    magic, version, count, pages = _HEAD.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or count > MAX_REGIONS:
        raise ValueError("no head of a record")
    regions = []
    for start, length, pid in _REGION.iter_unpack(memoryview(data)[_HEAD.size : _HEAD.size + count * _REGION.size]):
        region = Region(pid, start, length)
        if not length or not pid or start % PAGE_BYTES or region.end > MAX_ADDRESS:
            raise ValueError(f"a region that is none: {start:#x}, {length} pages, process {pid}")
        regions.append(region)
    if sum(r.pages for r in regions) != pages:
        raise ValueError("a record whose regions are not as long as it says")
    return regions


def batches(pid: int, runs: Sequence[tuple[int, int]]) -> Iterator[list[Region]]:
    """Cut runs of addresses (start, end) of one process into what fits one record each."""
    batch: list[Region] = []
    room = MAX_PAGES
    for start, end in runs:
        while start < end:
            pages = min((end - start) // PAGE_BYTES, room)
            batch.append(Region(pid, start, pages))
            start += pages * PAGE_BYTES
            room -= pages
            if not room or len(batch) == MAX_REGIONS:
                yield batch
                batch, room = [], MAX_PAGES
    if batch:
        yield batch


def files(directory: Path) -> list[Path]:
    """Return the passes in an image directory, the first one first. Raises: OSError."""
    found = [p for p in directory.glob("memory-*.img") if p.name[7:-4].isdigit()]
    return sorted(found, key=lambda p: int(p.name[7:-4]))


def name(number: int) -> str:
    """Return the name of a pass's file."""
    return f"memory-{number}.img"


def read(path: Path) -> tuple[mmap.mmap, list[tuple[Region, int]]]:
    """Map a pass; return its content, and each region with the offset of its pages there.

    Raises: ContainerError when it is damaged or not whole.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise ContainerError(f"{path}: {e.strerror}") from e
    try:
        content = mmap.mmap(fd, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    except (OSError, ValueError) as e:
        raise ContainerError(f"{path}: cannot be read: {e}") from e
    finally:
        os.close(fd)
    found: list[tuple[Region, int]] = []
    at = 0
    while True:
        try:
            if at + PAGE_BYTES > len(content):
                raise ValueError("there is no whole head")
            regions = parse(content[at : at + PAGE_BYTES])
        except (ValueError, struct.error) as e:
            raise ContainerError(f"{path} is damaged or cut short at byte {at}: {e}", hint="the images are not whole") from e
        at += PAGE_BYTES
        if not regions:
            return content, found
        for region in regions:
            found.append((region, at))
            at += region.pages * PAGE_BYTES
        if at > len(content):
            raise ContainerError(f"{path} is cut short: it has {len(content)} bytes", hint="the images are not whole")
