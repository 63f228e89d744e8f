"""Write the entries of a directory tree that another host sends: none of them reaches anything outside of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import xxhash

from migrate.errors import ProtocolError, TransferFailed
from migrate.outlet import Unpacker
from migrate.rootfs import DIRECTORY, open_regular, opened_parent
from migrate.wire import PIECE_BYTES, Wire
from migrate.wire_pb2 import Entry, Segment

_KEEP_SIZE = 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class TreeReceiver:
    """Writes entries below one directory; whoever sends them cannot reach anything else.

    With `flat` it takes regular files directly in the directory only, as the images of a checkpoint are: others write there, too.
    With `alone` it takes a file of that name and nothing else. `reserve_bytes` are kept free for each file before it comes.
    """

    def __init__(self, root: Path, flat: bool = False, alone: bytes | None = None, reserve_bytes: int = 0) -> None:
        self._flat, self._alone, self._reserve_bytes = flat, alone, reserve_bytes
        self._root_fd = os.open(root, DIRECTORY)
        try:
            fcntl.flock(self._root_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # who wants it as it is now sees that it is written to
        except BlockingIOError as e:
            os.close(self._root_fd)
            raise ProtocolError(f"nothing is taken into {root} any more") from e
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
        if self._alone is not None and entry.path != self._alone:
            raise ProtocolError(f"the other side sent {os.fsdecode(entry.path)!r}, which nobody waits for")
        if entry.path == b".":
            if not stat.S_ISDIR(entry.mode):
                raise ProtocolError("the other side sent a tree whose root is no directory")
            self._directories[b"."] = entry
            return
        if entry.removed:
            # Its directory may be gone already.
            with contextlib.suppress(FileNotFoundError), opened_parent(self._root_fd, entry.path) as (parent, name):
                self._remove(parent, name)
            self._directories.pop(entry.path, None)
            return
        # A pass over the memory may be mapped while the next one comes: what is there is replaced, and never changed.
        if self._flat and (b"/" in entry.path or not stat.S_ISREG(entry.mode) or entry.hard_link_to or entry.patch):
            raise ProtocolError(f"the other side sent {os.fsdecode(entry.path)!r}, which is no plain file of a checkpoint")
        with opened_parent(self._root_fd, entry.path) as (parent, name):
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
            with opened_parent(self._root_fd, entry.hard_link_to) as (other, other_name):
                os.link(other_name, name, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
            return
        if kind == stat.S_IFDIR:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
            os.close(os.open(name, DIRECTORY, dir_fd=parent))  # an old entry of that name must be a directory
            self._directories[entry.path] = entry
            return
        if kind == stat.S_IFREG and entry.patch:
            self._patch(entry, parent, name, wire)
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
            if self._reserve_bytes and _libc.fallocate(fd, _KEEP_SIZE, 0, self._reserve_bytes):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            end = self._content(entry, fd, wire)
            os.ftruncate(fd, max(end, entry.size))
        finally:
            os.close(fd)
        self._attributes(entry, parent, name)

    def _patch(self, entry: Entry, parent: int, name: bytes, wire: Wire) -> None:
        """Write what is new of a file that came before, and has this name only: another one would show the change, too."""
        fd = open_regular(name, parent, os.O_WRONLY)
        if fd is None:
            raise ProtocolError(f"the other side sent changes to {os.fsdecode(entry.path)!r}, which is no file")
        try:
            if os.fstat(fd).st_nlink != 1:
                raise ProtocolError(f"the other side sent changes to {os.fsdecode(entry.path)!r}, which has other names")
            self._content(entry, fd, wire)
            os.ftruncate(fd, entry.size)
            for attribute in own_attributes(fd) - set(entry.xattrs):
                os.removexattr(fd, attribute)
        finally:
            os.close(fd)
        self._attributes(entry, parent, name)

    def _content(self, entry: Entry, fd: int, wire: Wire) -> int:
        """Write the content that follows an entry; return where it ends. Raises: OSError, TransferFailed, ProtocolError."""
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
        return end

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
            with opened_parent(self._root_fd, entry.path) as (parent, name):
                fd = os.open(name, DIRECTORY, dir_fd=parent)
        try:
            os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, stat.S_IMODE(entry.mode))
            for attribute in own_attributes(fd) - set(entry.xattrs):
                os.removexattr(fd, attribute)  # of an earlier pass
            for attribute, value in entry.xattrs.items():
                os.setxattr(fd, attribute, value)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)


def own_attributes(path: int | str, follow: bool = True) -> set[str]:
    """Return the extended attributes that are the file's, and not those that the host's security module gives each."""
    try:
        names = os.listxattr(path, follow_symlinks=follow)
    except OSError as e:
        if e.errno == errno.ENOTSUP:
            return set()
        raise
    return {n for n in names if not n.startswith("security.") or n == "security.capability"}
