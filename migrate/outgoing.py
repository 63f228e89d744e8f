"""Send the entries of a directory tree, as they are at that moment."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import xxhash

from migrate.errors import TransferFailed
from migrate.manifest import Item
from migrate.outlet import Outlet
from migrate.rootfs import DIRECTORY, opened_parent
from migrate.wire import PIECE_BYTES
from migrate.wire_pb2 import EndOfFile, Entry, Frame


def _open_regular(name: bytes, parent: int) -> int | None:
    """Open a file for reading; None when it is no regular file. Raises: OSError."""
    # To open a device does something already: what this is, is looked at before.
    path_fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if not stat.S_ISREG(os.fstat(path_fd).st_mode):
            return None
        return os.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(path_fd)


class TreeSender:
    """Sends entries of one tree; `on_bytes` is called after each piece of content."""

    def __init__(self, outlet: Outlet, root: Path, on_bytes: Callable[[], None]) -> None:
        self._outlet, self._wire, self._on_bytes = outlet, outlet.wire, on_bytes
        self._root_fd = os.open(root, DIRECTORY)
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self.sent_bytes = 0

    def close(self) -> None:
        os.close(self._root_fd)

    def remove(self, path: bytes) -> None:
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
        fd = _open_regular(name, parent)
        if fd is None:
            return False  # it was swapped for something else
        try:
            entry.size = os.fstat(fd).st_size
            self._wire.send(Frame(entry=entry))
            self._content(fd, entry.size)
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

    def _content(self, fd: int, size: int) -> None:
        """Send the parts of a file that are no holes. A file that shrinks meanwhile is sent as far as it goes."""
        digest = xxhash.xxh3_128()
        position = 0
        while position < size:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
                end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
            except OSError:  # ENXIO: only a hole is left
                break
            if start >= size:
                break
            os.lseek(fd, start, os.SEEK_SET)
            while start < end:
                count = os.readv(fd, [self._buffer[: min(PIECE_BYTES, end - start)]])
                if not count:
                    size = start
                    break
                piece = self._buffer[:count]
                self._outlet.send(start, piece)
                digest.update(piece)
                self.sent_bytes += count
                start += count
                self._on_bytes()
            position = end
        self._wire.send(Frame(end_of_file=EndOfFile(digest=digest.digest())))


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
