"""Send the entries of a directory tree, as they are at that moment."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from migrate.blocks import LEAST_FILE_BYTES, Blocks, Extents
from migrate.errors import TransferFailed
from migrate.manifest import Item
from migrate.outlet import Outlet
from migrate.rootfs import DIRECTORY, open_regular, opened_parent
from migrate.wire import PIECE_BYTES
from migrate.wire_pb2 import EndOfFile, Entry, Frame


def _extents(fd: int, size: int) -> Extents:
    """Return where a file has data, up to `size`."""
    found: list[tuple[int, int]] = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError:  # ENXIO: only a hole is left
            break
        if start < position:
            found.append((start, position))
    return found


class TreeSender:
    """Sends entries of one tree; `on_bytes` is called after each piece of content.

    `blocks` is what the receiver has of large files, by path; it is kept up to date, and means nothing when sending fails.
    `done_bytes` is the content that was gone through, `sent_bytes` what of it was sent.
    """

    def __init__(
        self, outlet: Outlet, root: Path, on_bytes: Callable[[], None], blocks: dict[bytes, Blocks] | None = None
    ) -> None:
        self._outlet, self._wire, self._on_bytes = outlet, outlet.wire, on_bytes
        self._root_fd = os.open(root, DIRECTORY)
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._blocks = {} if blocks is None else blocks
        self.sent_bytes = self.done_bytes = 0

    def close(self) -> None:
        os.close(self._root_fd)

    def remove(self, path: bytes) -> None:
        self._blocks.pop(path, None)
        self._wire.send(Frame(entry=Entry(path=path, removed=True)))

    def send(self, item: Item, hard_link_to: bytes | None = None) -> bool:
        """Send one entry with its content; False when it vanished: the next look will see to it.

        Raises: TransferFailed, ConnectionLost.
        """
        if item.path == b".":
            fd = os.dup(self._root_fd)
            try:
                entry = self._entry(item)
                self._add_xattrs(entry, f"/proc/self/fd/{fd}", follow=True)
                self._wire.send(Frame(entry=entry))
            finally:
                os.close(fd)
            return True
        try:
            with opened_parent(self._root_fd, item.path) as (parent, name):
                return self._send(item, parent, name, hard_link_to)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as e:
            raise TransferFailed(f"cannot read {os.fsdecode(item.path)}: {e.strerror}") from e

    @staticmethod
    def _entry(item: Item) -> Entry:
        return Entry(
            path=item.path,
            mode=item.mode,
            uid=item.uid,
            gid=item.gid,
            mtime_ns=item.mtime_ns,
            size=item.size,
            rdev=item.rdev,
        )

    def _send(self, item: Item, parent: int, name: bytes, hard_link_to: bytes | None) -> bool:
        entry = self._entry(item)
        known = self._blocks.pop(item.path, None)
        if hard_link_to is not None:
            entry.hard_link_to = hard_link_to
            self._wire.send(Frame(entry=entry))
            return True
        if stat.S_ISLNK(item.mode):
            entry.link_target = os.readlink(name, dir_fd=parent)
        self._add_xattrs(entry, f"/proc/self/fd/{parent}/{os.fsdecode(name)}", follow=False)
        if not item.is_file:
            self._wire.send(Frame(entry=entry))
            return True
        fd = open_regular(name, parent)
        if fd is None:
            return False  # it was swapped for something else
        try:
            st = os.fstat(fd)
            entry.size = st.st_size
            extents = _extents(fd, entry.size)
            blocks: Blocks | None = None
            # What has other names is made anew with them.
            if entry.size >= LEAST_FILE_BYTES and item.links == st.st_nlink == 1:
                entry.patch = known is not None and not known.loses(extents, entry.size)
                blocks = known if entry.patch else Blocks(entry.size)
            self._wire.send(Frame(entry=entry))
            self._content(fd, entry, extents, blocks)
            if blocks is not None:
                blocks.cut(entry.size)
                self._blocks[item.path] = blocks
        finally:
            os.close(fd)
        return True

    @staticmethod
    def _add_xattrs(entry: Entry, path: str, follow: bool) -> None:
        try:
            for name in os.listxattr(path, follow_symlinks=follow):
                with contextlib.suppress(OSError):  # removed meanwhile
                    entry.xattrs[name] = os.getxattr(path, name, follow_symlinks=follow)
        except OSError as e:
            if e.errno not in (errno.ENOTSUP, errno.EPERM):
                raise

    def grow(self, name: bytes) -> GrowingFile:
        """Begin to send a file of the root directory that is still being appended to. Raises: OSError."""
        return GrowingFile(self._outlet, os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root_fd), name)

    def _content(self, fd: int, entry: Entry, extents: Extents, blocks: Blocks | None) -> None:
        """Send the parts of a file that are no holes, or what of it is new; one that shrinks meanwhile as far as it goes."""
        digest = xxhash.xxh3_128()
        for start, block_end in extents if blocks is None else blocks.around(extents):
            end = min(block_end, entry.size)
            while start < end and (piece := self._read(fd, start, min(PIECE_BYTES, end - start))):
                if blocks is not None and not entry.patch:
                    _blank(piece, start, extents)
                for at, changed in [(start, piece)] if blocks is None else blocks.take(start, piece):
                    # Where something was, zeros are sent, too; where nothing was, holes stay holes.
                    for offset, part in [(at, changed)] if entry.patch else _within(extents, at, changed):
                        self._outlet.send(offset, part)
                        digest.update(part)
                        self.sent_bytes += len(part)
                start += len(piece)
                self.done_bytes += len(piece)
                self._on_bytes()
        self._wire.send(Frame(end_of_file=EndOfFile(digest=digest.digest())))

    def _read(self, fd: int, offset: int, count: int) -> memoryview:
        """Return what is there, up to the end of the file. Raises: OSError."""
        got = 0
        while got < count and (more := os.preadv(fd, [self._buffer[got:count]], offset + got)):
            got += more
        return self._buffer[:got]


def _blank(content: memoryview, offset: int, extents: Extents) -> None:
    """Make zeros of what has come into a hole since it was one: it is not sent, and must not be taken for what was."""
    at = 0
    for start, part in list(_within(extents, offset, content)):
        content[at : start - offset] = bytes(start - offset - at)
        at = start - offset + len(part)
    content[at:] = bytes(len(content) - at)


def _within(extents: Extents, offset: int, content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give the parts of a piece that are data."""
    behind = offset + len(content)
    first = bisect_right(extents, (offset, 0))
    for number in range(max(first - 1, 0), len(extents)):
        start, end = max(extents[number][0], offset), min(extents[number][1], behind)
        if start >= behind:
            return
        if start < end:
            yield start, content[start - offset : end - offset]


class StreamedFile:
    """Sends a file whose content comes piece by piece, and whose length is not known before its end."""

    def __init__(self, outlet: Outlet, entry: Entry) -> None:
        self._outlet = outlet
        self._digest = xxhash.xxh3_128()
        self.sent_bytes = 0
        outlet.wire.send(Frame(entry=entry))

    def send(self, piece: memoryview) -> None:
        """Send the next piece. Raises: ConnectionLost."""
        self._outlet.send(self.sent_bytes, piece)
        self._digest.update(piece)
        self.sent_bytes += len(piece)

    def end(self) -> None:
        """The file is whole. Raises: ConnectionLost."""
        self._outlet.wire.send(Frame(end_of_file=EndOfFile(digest=self._digest.digest())))


class GrowingFile:
    """Sends what a writer has appended so far, again and again, until it is said to be whole."""

    def __init__(self, outlet: Outlet, fd: int, name: bytes) -> None:
        self._fd = fd
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        st = os.fstat(fd)
        entry = Entry(path=name, mode=st.st_mode, uid=st.st_uid, gid=st.st_gid, mtime_ns=st.st_mtime_ns)
        self._file = StreamedFile(outlet, entry)

    @property
    def sent_bytes(self) -> int:
        return self._file.sent_bytes

    def send_new(self) -> None:
        """Send what was appended since the last time. Raises: OSError, ConnectionLost."""
        while count := os.preadv(self._fd, [self._buffer], self.sent_bytes):
            self._file.send(self._buffer[:count])

    def end(self) -> None:
        """Send the rest of a file that is whole now."""
        self.send_new()
        self._file.end()
        os.close(self._fd)
