"""The memory in an image directory: which pages of which process lie where, through a chain of parents.

    pagemap-ID.img   pagemap_head{pages_id}, then pagemap_entry{vaddr, nr_pages, flags}, in the order of addresses
    pages-N.img      the content of the PRESENT entries of the pagemap with pages_id N, one after the other
    parent           link to the directory where the content of PARENT entries is

ID is the number of a process in its pid namespace, or `shmem-` and the inode of shared memory.

Source: CRIU's images/pagemap.proto, criu/pagemap.c, criu/image.c.
"""

from __future__ import annotations

import bisect
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import ContainerError
from runtime.files import owners_alone
from runtime.values import Value

PAGE_BYTES = mmap.PAGESIZE
PARENT, LAZY, PRESENT = 1, 2, 4
_MAGIC = struct.pack("<II", 0x54564319, 0x56084025)
_MAX_ENTRY_BYTES = 1 << 16


class Entry(Value):
    """A run of pages. Units: `start` is an address in bytes."""

    start: int
    pages: int
    flags: int

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE_BYTES


def preload() -> None:
    """Import what `load` needs, which takes longer than `load`, when there is time for it."""
    from pycriu.images import pagemap_pb2  # noqa: F401


def load(path: Path) -> tuple[int, list[Entry]]:
    """Read a pagemap; return its pages_id and entries. Raises: ContainerError when it is damaged; OSError."""
    from pycriu.images import pagemap_pb2

    data = path.read_bytes()
    if data[:8] != _MAGIC:
        raise ContainerError(f"{path}: is no pagemap image")
    try:
        messages = list(_messages(data))
        pages_id = pagemap_pb2.pagemap_head.FromString(messages[0]).pages_id
        entries = []
        for raw in messages[1:]:
            e = pagemap_pb2.pagemap_entry.FromString(raw)
            flags = e.flags if e.HasField("flags") else PARENT if e.in_parent else PRESENT
            entries.append(Entry(e.vaddr, e.nr_pages or e.compat_nr_pages, flags))
    except Exception as e:
        raise ContainerError(f"{path}: is damaged or cut short: {e}") from e
    return pages_id, entries


def _messages(data: bytes) -> Iterator[bytes]:
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        if length > _MAX_ENTRY_BYTES or at + 4 + length > len(data):
            raise ValueError(f"no whole entry at offset {at}")
        yield data[at + 4 : at + 4 + length]
        at += 4 + length


def save(path: Path, pages_id: int, entries: list[Entry]) -> None:
    """Write a pagemap, atomically. Raises: OSError."""
    from pycriu.images import pagemap_pb2

    # Since CRIU 4.2 the number of pages has 64 bits, in a field of its own beside the old one.
    old = {"compat_nr_pages": 0} if "compat_nr_pages" in pagemap_pb2.pagemap_entry.DESCRIPTOR.fields_by_name else {}
    messages = [pagemap_pb2.pagemap_head(pages_id=pages_id)]
    messages += [pagemap_pb2.pagemap_entry(vaddr=e.start, nr_pages=e.pages, flags=e.flags, **old) for e in entries]
    parts = [_MAGIC]
    for message in messages:
        raw = message.SerializeToString()
        parts += [struct.pack("<I", len(raw)), raw]
    new = path.with_name(path.name + ".new")
    new.write_bytes(b"".join(parts))
    new.rename(path)


def is_elsewhere(entry: Entry) -> bool:
    """Say whether an entry's content lies neither here nor with a parent: a lazy dump keeps it for its page server."""
    return not entry.flags & (PRESENT | PARENT)


class Segment(Value):
    """Pages from `start` to `end` have their content at `offset` of `content`; `lazy` is the LAZY flag of where that lies."""

    start: int
    end: int
    content: mmap.mmap
    offset: int
    lazy: int


class Known:
    """The content of one pagemap's pages, as a restore would find it."""

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments
        self._starts = [s.start for s in segments]

    def within(self, start: int, end: int) -> Iterator[Segment]:
        """Return what is known of a range, in order, clipped to it."""
        at = max(0, bisect.bisect_right(self._starts, start) - 1)
        for i in range(at, len(self._segments)):
            s = self._segments[i]
            if s.start >= end:
                return
            first, last = max(s.start, start), min(s.end, end)
            if first < last:
                yield Segment(first, last, s.content, s.offset + first - s.start, s.lazy)


NOTHING = Known([])


def known(directory: Path, name: str, depth: int = 0) -> Known:
    """Return what an image directory and its parents know of a pagemap; nothing when they have none of that name.

    Raises: ContainerError when one is damaged or cut short.
    """
    path = directory / name
    if not path.is_file():
        return NOTHING
    if depth > 1000:
        raise ContainerError(f"{directory}: its parents go round in a circle")
    pages_id, entries = load(path)
    content: mmap.mmap | None = None
    pages = directory / f"pages-{pages_id}.img"
    needed = sum(e.pages for e in entries if e.flags & PRESENT and not e.flags & PARENT) * PAGE_BYTES
    if needed:
        content = _map(pages, needed)
    parent = known(directory / "parent", name, depth + 1) if any(e.flags & PARENT for e in entries) else NOTHING
    segments: list[Segment] = []
    offset = 0
    for e in entries:
        if e.flags & PARENT:
            segments += parent.within(e.start, e.end)
        elif e.flags & PRESENT and content is not None:
            segments.append(Segment(e.start, e.end, content, offset, e.flags & LAZY))
            offset += e.pages * PAGE_BYTES
    return Known(segments)


def require_whole(directory: Path) -> None:
    """Refuse images that lack pages which they, or their parents, are to have. Raises: ContainerError."""
    for path in directory.glob("pagemap-*.img"):
        known(directory, path.name)


def _map(path: Path, needed: int) -> mmap.mmap:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise ContainerError(f"{path}: {e.strerror}", hint="the images are not whole") from e
    try:
        size = os.fstat(fd).st_size
        if size < needed:
            raise ContainerError(f"{path} is cut short: it has {size} bytes, its pagemap needs {needed}")
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def flatten(directory: Path) -> None:
    """Copy into an image directory what its parents have, and part it from them; nothing to do without a parent.

    CRIU's lazy-pages daemon never ends reading a page that lies with a parent.

    Raises: ContainerError when an image is damaged; OSError. The images are whole at any time.
    """
    if not (directory / "parent").is_symlink():
        return
    for path in sorted(directory.glob("pagemap-*.img")):
        pages_id, entries = load(path)
        if not any(e.flags & PARENT for e in entries):
            continue
        content = known(directory, path.name)
        new = directory / f"pages-{pages_id}.img.new"
        flat: list[Entry] = []
        with open(new, "wb", opener=owners_alone) as f:
            for e in entries:
                at = e.start
                for s in content.within(e.start, e.end) if e.flags & (PARENT | PRESENT) else ():
                    if s.start != at:
                        break
                    f.write(memoryview(s.content)[s.offset : s.offset + s.end - s.start])
                    # CRIU tells only where the content is whether it may follow later; a lazy restore needs it for all that may.
                    append(flat, s.start, (s.end - s.start) // PAGE_BYTES, e.flags & ~PARENT | PRESENT | s.lazy)
                    at = s.end
                if not e.flags & (PARENT | PRESENT):
                    append(flat, e.start, e.pages, e.flags)
                elif at != e.end:
                    raise ContainerError(f"{path}: a parent has no page at {at:#x}", hint="the images are not whole")
        # The pagemap is the last to change: until then the old one finds the old pages under their old name.
        fresh = max(int(p.name[6:-4]) for p in directory.glob("pages-*.img")) + 1
        new.rename(directory / f"pages-{fresh}.img")
        save(path, fresh, flat)
        (directory / f"pages-{pages_id}.img").unlink(missing_ok=True)
    (directory / "parent").unlink()


def append(entries: list[Entry], start: int, pages: int, flags: int) -> None:
    """Add a run, joined to the one before it where they are of a kind."""
    if entries and entries[-1].end == start and entries[-1].flags == flags:
        last = entries.pop()
        start, pages = last.start, last.pages + pages
    entries.append(Entry(start, pages, flags))
