"""Pre-dumps for kernels that do not track dirty pages: memory is compared, page by page, with what the parent images have.

    pre-dump    reads the memory of the running processes; writes the pages that differ from the parent's
    dump        CRIU writes all pages; those that the parent has are then dropped from the images

The outcome is the same as that of CRIU's own pre-dumps: a chain of image directories in which each holds what changed, and of
which CRIU restores. A pre-dump touches nobody: no process is stopped for it, and a page that is written to while it is read
differs from the copy at the end, and is then written anew.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runtime.criu import images, pagemap
from runtime.criu.pagemap import PAGE_BYTES, PARENT, PRESENT, Entry, Known
from runtime.errors import KernelError
from runtime.linux import procfs

_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61
_AT_ONCE_PAGES = 256
# A run that differs is looked at in these steps: what is equal costs one comparison for many pages.
_STEPS = (_AT_ONCE_PAGES, 32, 1)
_NOT_MEMORY = ("[vvar", "[vdso]", "[vsyscall]", "[uprobes]")


class _Sieve:
    """Writes a pagemap and its pages, leaving out what is known."""

    def __init__(self, directory: Path, pages_id: int, known: Known) -> None:
        self._known = known
        self._pages: BinaryIO | None = None
        self._path = directory / f"pages-{pages_id}.img.new"
        self.entries: list[Entry] = []
        self.written = self.skipped = 0

    def put(self, start: int, content: bytes | memoryview, flags: int) -> None:
        """Take some pages in a row; `flags` are those that they have in the pagemap. Raises: OSError."""
        end, at = start + len(content), start
        for s in self._known.within(start, end):
            if s.start > at:
                self._write(at, content[at - start : s.start - start], flags)
            self._compare(s.start, content[s.start - start : s.end - start], s.content, s.offset, flags, 0)
            at = s.end
        if at < end:
            self._write(at, content[at - start :], flags)

    def _compare(self, start: int, new: bytes | memoryview, old: mmap.mmap, offset: int, flags: int, step: int) -> None:
        size = _STEPS[step] * PAGE_BYTES
        for at in range(0, len(new), size):
            part = new[at : at + size]
            if bytes(part) == old[offset + at : offset + at + len(part)]:
                pages = len(part) // PAGE_BYTES
                pagemap.append(self.entries, start + at, pages, flags & ~PRESENT | PARENT)
                self.skipped += pages
            elif step + 1 < len(_STEPS):
                self._compare(start + at, part, old, offset + at, flags, step + 1)
            else:
                self._write(start + at, part, flags)

    def _write(self, start: int, content: bytes | memoryview, flags: int) -> None:
        if self._pages is None:
            self._pages = self._path.open("wb")
        self._pages.write(content)
        pagemap.append(self.entries, start, len(content) // PAGE_BYTES, flags)
        self.written += len(content) // PAGE_BYTES

    def finish(self) -> None:
        """Put the pages in their place. Raises: OSError."""
        if self._pages is None:
            self._pages = self._path.open("wb")
        self._pages.close()
        self._path.rename(self._path.with_suffix(""))


def pre_dump(pids: list[int], directory: Path, parent: Path | None) -> dict[str, int]:
    """Write the memory of running processes, without what `parent` has of it. Returns what CRIU's statistics would.

    Raises: ContainerError; the directory is then of no use.
    """
    scanned = skipped = written = 0
    try:
        _link_parent(directory, parent)
        for pages_id, (name, regions) in enumerate(_memory(pids), 1):
            sieve = _Sieve(directory, pages_id, pagemap.known(parent, name) if parent else pagemap.NOTHING)
            for start, content in regions:
                scanned += len(content) // PAGE_BYTES
                sieve.put(start, content, PRESENT)
            sieve.finish()
            pagemap.save(directory / name, pages_id, sieve.entries)
            skipped, written = skipped + sieve.skipped, written + sieve.written
    except OSError as e:
        raise KernelError(f"cannot write the images in {directory}", e.errno or 0) from e
    found = {"pages_scanned": scanned, "pages_skipped_parent": skipped, "pages_written": written}
    images.save_stats(directory, found)
    return found


def drop_known(directory: Path, parent: Path) -> dict[str, int]:
    """Drop from a whole dump the pages that its parent has; return what that changes in the statistics.

    Raises: ContainerError; the dump is whole still, or of no use.
    """
    skipped = written = 0
    try:
        _link_parent(directory, parent)
        for path in sorted(directory.glob("pagemap-*.img")):
            known = pagemap.known(parent, path.name)
            pages_id, entries = pagemap.load(path)
            whole = pagemap.known(directory, path.name)
            sieve = _Sieve(directory, pages_id, known)
            for e in entries:
                if not e.flags & PRESENT:
                    sieve.entries.append(e)
                    continue
                for s in whole.within(e.start, e.end):
                    for at in range(0, s.end - s.start, _AT_ONCE_PAGES * PAGE_BYTES):
                        size = min(_AT_ONCE_PAGES * PAGE_BYTES, s.end - s.start - at)
                        sieve.put(s.start + at, s.content[s.offset + at : s.offset + at + size], e.flags)
            sieve.finish()
            pagemap.save(path, pages_id, sieve.entries)
            skipped, written = skipped + sieve.skipped, written + sieve.written
    except OSError as e:
        raise KernelError(f"cannot write the images in {directory}", e.errno or 0) from e
    return {"pages_skipped_parent": skipped, "pages_written": written}


def _link_parent(directory: Path, parent: Path | None) -> None:
    link = directory / "parent"
    with contextlib.suppress(FileNotFoundError):
        link.unlink()
    if parent is not None:
        link.symlink_to(os.path.relpath(parent, directory))


def _memory(pids: list[int]) -> Iterator[tuple[str, Iterator[tuple[int, bytes]]]]:
    """Return for each process, and each piece of shared memory, its pagemap's name and what is in it."""
    shared: dict[int, tuple[int, list[tuple[int, int, int]]]] = {}
    for pid in pids:
        try:
            number = procfs.number_inside(pid)
            areas = list(_areas(pid))
        except OSError:
            continue  # it has ended
        yield (
            f"pagemap-{number}.img",
            _regions(pid, [(a, b, a) for a, b, is_shared, _, _ in areas if not is_shared], private=True),
        )
        for start, end, is_shared, offset, inode in areas:
            if is_shared:
                shared.setdefault(inode, (pid, []))
                if shared[inode][0] == pid:
                    shared[inode][1].append((start, end, offset))
    for inode, (pid, parts) in shared.items():
        yield f"pagemap-shmem-{inode}.img", _regions(pid, sorted(parts, key=lambda p: p[2]), private=False)


def _areas(pid: int) -> Iterator[tuple[int, int, bool, int, int]]:
    """Return the mappings that hold a process's own memory: start, end, whether shared, offset and inode of what is shared."""
    for start, end, permissions, offset, _, inode, name in procfs.mappings(pid):
        if permissions[3] == "p":
            if not name.startswith(_NOT_MEMORY):
                yield start, end, False, 0, 0
        elif name.startswith(("/dev/zero", "/memfd:", "/SYSV")):
            yield start, end, True, offset, inode


def _regions(pid: int, parts: list[tuple[int, int, int]], *, private: bool) -> Iterator[tuple[int, bytes]]:
    """Read what is in memory of some ranges (start, end, address in the image); nothing of a process that has ended."""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        table = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return
    try:
        told = 0
        for start, end, address in parts:
            for first, last in _filled(table, start, end, private):
                for at in range(first, last, _AT_ONCE_PAGES * PAGE_BYTES):
                    size = min(_AT_ONCE_PAGES * PAGE_BYTES, last - at)
                    # What is unmapped by now is none of the process's memory any more.
                    with contextlib.suppress(OSError):
                        content = os.pread(memory, size, at)
                        content = content[: len(content) - len(content) % PAGE_BYTES]
                        place = at - start + address
                        if content and place >= told:
                            yield place, content
                            told = place + len(content)
    finally:
        os.close(memory)
        os.close(table)


def _filled(table: int, start: int, end: int, private: bool) -> Iterator[tuple[int, int]]:
    """Return the runs of a range that hold pages: of a private mapping those that are not the file's."""
    step = 1 << 16  # pages
    for base in range(start, end, step * PAGE_BYTES):
        count = min(step, (end - base) // PAGE_BYTES)
        raw = os.pread(table, count * 8, base // PAGE_BYTES * 8)
        bits = array.array("Q")
        bits.frombytes(raw[: len(raw) - len(raw) % 8])
        run: int | None = None
        for i, b in enumerate(bits):
            filled = bool(b & (_PRESENT | _SWAPPED)) and not (private and b & _OF_FILE)
            if filled and run is None:
                run = i
            elif not filled and run is not None:
                yield base + run * PAGE_BYTES, base + i * PAGE_BYTES
                run = None
        if run is not None:
            yield base + run * PAGE_BYTES, base + len(bits) * PAGE_BYTES
