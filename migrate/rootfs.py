"""Look at a directory tree, and write one, without ever following a link of it.

Every name is opened below the descriptor of its directory with O_NOFOLLOW, one component at a time: a container
owns what is in its rootfs, and may swap a directory for a link at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from migrate.errors import ProtocolError, TransferFailed
from migrate.manifest import Item, Manifest
from migrate.outlet import Outlet, Unpacker
from migrate.wire import PIECE_BYTES, Wire
from migrate.wire_pb2 import EndOfFile, Entry, Frame, Segment

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


# Called with each directory, open, and its path, before what is in it is looked at.
OnDirectory = Callable[[int, bytes], None]


def scan(root: Path, on_directory: OnDirectory = lambda fd, path: None) -> Manifest:
    """Look at a whole tree; entries that vanish meanwhile are left out.

    Raises: TransferFailed when the root cannot be read.
    """
    manifest: Manifest = {}
    with _opened_root(root) as fd:
        on_directory(fd, b".")
        manifest[b"."] = _item(b".", os.fstat(fd))
        _scan(fd, b"", os.fstat(fd).st_dev, manifest, on_directory)
    return manifest


def look_at(root: Path, path: bytes, below: bool, on_directory: OnDirectory = lambda fd, path: None) -> Manifest:
    """Look at one entry of a tree, and with `below` at all that is below it; empty when it is not there.

    Raises: TransferFailed when it cannot be read.
    """
    manifest: Manifest = {}
    with _opened_root(root) as fd:
        st = os.fstat(fd)
        if path == b".":
            return {path: _item(path, st)}
        try:
            with _opened_parent(fd, path) as (parent, name):
                # What is mounted over a directory on the way is not in the tree.
                if os.fstat(parent).st_dev == st.st_dev:
                    _look(parent, name, path, st.st_dev, manifest, on_directory if below else None)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as e:
            if e.errno != errno.ELOOP:
                raise TransferFailed(f"cannot read {os.fsdecode(path)}: {e.strerror}") from e
    return manifest


@contextlib.contextmanager
def _opened_root(root: Path) -> Iterator[int]:
    """Raises: TransferFailed when it cannot be opened."""
    try:
        fd = os.open(root, _DIRECTORY)
    except OSError as e:
        raise TransferFailed(f"cannot read {root}: {e.strerror}") from e
    try:
        yield fd
    finally:
        os.close(fd)


def _item(path: bytes, st: os.stat_result) -> Item:
    size = st.st_size if stat.S_ISREG(st.st_mode) else 0
    return Item(
        path, st.st_mode, st.st_uid, st.st_gid, size, st.st_rdev, st.st_mtime_ns, st.st_ctime_ns,
        (st.st_dev, st.st_ino), st.st_nlink, time.time_ns(),
    )  # fmt: skip


def _scan(fd: int, prefix: bytes, device: int, manifest: Manifest, on_directory: OnDirectory) -> None:
    with os.scandir(fd) as entries:
        names = sorted(os.fsencode(e.name) for e in entries)
    for name in names:
        path = prefix + name
        try:
            _look(fd, name, path, device, manifest, on_directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            raise TransferFailed(f"cannot read {os.fsdecode(path)}: {e.strerror}") from e


def _look(parent: int, name: bytes, path: bytes, device: int, manifest: Manifest, on_directory: OnDirectory | None) -> None:
    """Add an entry, and with `on_directory` what is below it. Raises: OSError."""
    st = os.stat(name, dir_fd=parent, follow_symlinks=False)
    # Of a mount point the directory goes, but not what is mounted there.
    if on_directory is None or not stat.S_ISDIR(st.st_mode) or st.st_dev != device:
        manifest[path] = _item(path, st)
        return
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        on_directory(fd, path)
        manifest[path] = _item(path, os.fstat(fd))
        _scan(fd, path + b"/", device, manifest, on_directory)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened_parent(root_fd: int, path: bytes) -> Iterator[tuple[int, bytes]]:
    """Open the directory that holds `path`; give its descriptor and the last component. Raises: ProtocolError, OSError."""
    parts = path.split(b"/")
    if any(p in (b"", b".", b"..") for p in parts):
        raise ProtocolError(f"the other side sent a path that is none: {os.fsdecode(path)!r}")
    fd = os.dup(root_fd)
    try:
        for part in parts[:-1]:
            below = os.open(part, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd, parts[-1]
    finally:
        os.close(fd)


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
        self._root_fd = os.open(root, _DIRECTORY)
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
            with _opened_parent(self._root_fd, item.path) as (parent, name):
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


class TreeReceiver:
    """Writes entries below one directory; whoever sends them cannot reach anything else.

    With `flat` it takes regular files directly in the directory only, as the images of a checkpoint are: others write there, too.
    """

    def __init__(self, root: Path, flat: bool = False) -> None:
        self._flat = flat
        self._root_fd = os.open(root, _DIRECTORY)
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._unpacker = Unpacker()
        # Times and modes of directories are set at the end: writing into one changes them.
        self._directories: dict[bytes, Entry] = {}
        self.entries = 0
        self.content_bytes = 0

    def close(self) -> None:
        os.close(self._root_fd)

    def receive(self, wire: Wire) -> None:
        """Take entries until EndOfTree.

        Raises: TransferFailed, ProtocolError, ConnectionLost; what was written stays for whoever discards it.
        """
        while True:
            frame = wire.receive()
            kind = frame.WhichOneof("body")
            if kind == "end_of_tree":
                break
            if kind != "entry":
                raise ProtocolError(f"the other side sent {kind} inside a tree")
            try:
                self._take(frame.entry, wire)
            except OSError as e:
                hint = "free some space there" if e.errno in (28, 122) else None
                raise TransferFailed(f"cannot write {os.fsdecode(frame.entry.path)}: {e.strerror}", hint=hint) from e
            except (ValueError, OverflowError) as e:
                raise ProtocolError(f"the other side sent what nothing can be made of: {frame.entry.path!r}: {e}") from e
            self.entries += 1
        try:
            for path in sorted(self._directories, key=lambda p: p.count(b"/"), reverse=True):
                self._finish_directory(self._directories[path])
        except OSError as e:
            raise TransferFailed(f"cannot set the attributes of a directory: {e.strerror}") from e
        except (ValueError, OverflowError) as e:
            raise ProtocolError(f"the other side sent attributes that are none: {e}") from e
        self._directories.clear()

    def _take(self, entry: Entry, wire: Wire) -> None:
        if entry.path == b".":
            if not stat.S_ISDIR(entry.mode):
                raise ProtocolError("the other side sent a tree whose root is no directory")
            self._directories[b"."] = entry
            return
        if entry.removed:
            # Its directory may be gone already.
            with contextlib.suppress(FileNotFoundError), _opened_parent(self._root_fd, entry.path) as (parent, name):
                self._remove(parent, name)
            self._directories.pop(entry.path, None)
            return
        if self._flat and (b"/" in entry.path or not stat.S_ISREG(entry.mode) or entry.hard_link_to):
            raise ProtocolError(f"the other side sent {os.fsdecode(entry.path)!r}, which is no plain file of a checkpoint")
        with _opened_parent(self._root_fd, entry.path) as (parent, name):
            self._make(entry, parent, name, wire)

    @staticmethod
    def _remove(parent: int, name: bytes) -> None:
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            shutil.rmtree(name, dir_fd=parent)

    def _make(self, entry: Entry, parent: int, name: bytes, wire: Wire) -> None:
        kind = stat.S_IFMT(entry.mode)
        if entry.hard_link_to:
            self._remove(parent, name)
            with _opened_parent(self._root_fd, entry.hard_link_to) as (other, other_name):
                os.link(other_name, name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
            return
        if kind == stat.S_IFDIR:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
            os.close(os.open(name, _DIRECTORY, dir_fd=parent))  # an old entry of that name must be a directory
            self._directories[entry.path] = entry
            return
        self._remove(parent, name)
        if kind == stat.S_IFREG:
            self._file(entry, parent, name, wire)
            return
        if kind == stat.S_IFLNK:
            os.symlink(entry.link_target, name, dir_fd=parent)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
            os.mknod(name, kind | 0o600, entry.rdev, dir_fd=parent)
        else:
            raise ProtocolError(f"the other side sent an entry of no known type: {entry.mode:o}")
        self._attributes(entry, parent, name)

    def _file(self, entry: Entry, parent: int, name: bytes, wire: Wire) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            digest = xxhash.xxh3_128()
            end = 0
            while True:
                frame = wire.receive()
                if frame.WhichOneof("body") == "end_of_file":
                    break
                if frame.WhichOneof("body") != "segment" or frame.segment.offset < end:
                    raise ProtocolError("the other side sent something else than file content")
                offset = frame.segment.offset
                for piece in self._pieces(frame.segment, wire):
                    digest.update(piece)
                    while piece:
                        written = os.pwrite(fd, piece, offset)
                        piece = piece[written:]
                        offset += written
                if offset != frame.segment.offset + frame.segment.length:
                    raise ProtocolError("the other side sent another length of file content than it announced")
                end = offset
                self.content_bytes += frame.segment.length
            if digest.digest() != frame.end_of_file.digest:
                raise TransferFailed(f"{os.fsdecode(entry.path)} is not what was sent: its digest differs")
            os.ftruncate(fd, max(end, entry.size))
        finally:
            os.close(fd)
        self._attributes(entry, parent, name)

    def _pieces(self, segment: Segment, wire: Wire) -> Iterator[memoryview]:
        """Give a segment's content as it arrives. Raises: ConnectionLost, ProtocolError."""
        if not segment.packed:
            yield from wire.receive_raw(self._buffer)
            return
        arrived = bytearray().join(bytes(part) for part in wire.receive_raw(self._buffer))
        yield self._unpacker.unpack(memoryview(arrived), segment.length)

    def _attributes(self, entry: Entry, parent: int, name: bytes) -> None:
        """Set owner, mode, extended attributes and time, in the order in which none undoes another."""
        os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        path = f"/proc/self/fd/{parent}/{os.fsdecode(name)}"
        if not stat.S_ISLNK(entry.mode):
            # By name alone it would follow a link that has come to be there.
            made = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                if stat.S_IFMT(os.fstat(made).st_mode) != stat.S_IFMT(entry.mode):
                    raise ProtocolError(f"{os.fsdecode(entry.path)} was replaced while it was made")
                os.chmod(f"/proc/self/fd/{made}", stat.S_IMODE(entry.mode))
            finally:
                os.close(made)
        for attribute, value in entry.xattrs.items():
            os.setxattr(path, attribute, value, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _finish_directory(self, entry: Entry) -> None:
        fd = os.dup(self._root_fd)
        if entry.path != b".":
            os.close(fd)
            with _opened_parent(self._root_fd, entry.path) as (parent, name):
                fd = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, stat.S_IMODE(entry.mode))
            for attribute, value in entry.xattrs.items():
                os.setxattr(fd, attribute, value)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)
