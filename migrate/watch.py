"""Which names below a directory change: told by the kernel as it happens, so that nobody has to look for them.

A fanotify mark on the file system reports each change with the directory and the name. What is written through a shared mapping
is not reported: of that the close of the file is, at last, and until then whoever has it open or mapped is known by other means.

Source: fanotify(7), fanotify_init(2), fanotify_mark(2), name_to_handle_at(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

_FAN_CLOEXEC, _FAN_NONBLOCK, _FAN_UNLIMITED_QUEUE = 0x1, 0x2, 0x10
_FAN_REPORT_FID, _FAN_REPORT_DIR_FID, _FAN_REPORT_NAME, _FAN_REPORT_TARGET_FID = 0x200, 0x400, 0x800, 0x1000
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
_FAN_MODIFY, _FAN_ATTRIB, _FAN_CLOSE_WRITE, _FAN_MOVED_FROM, _FAN_MOVED_TO = 0x2, 0x4, 0x8, 0x40, 0x80
_FAN_CREATE, _FAN_DELETE, _FAN_Q_OVERFLOW, _FAN_ONDIR = 0x100, 0x200, 0x4000, 0x40000000
_MASK = (
    _FAN_MODIFY | _FAN_ATTRIB | _FAN_CLOSE_WRITE | _FAN_MOVED_FROM | _FAN_MOVED_TO | _FAN_CREATE | _FAN_DELETE | _FAN_ONDIR
)  # fmt: skip
_INFO_FID, _INFO_DFID_NAME = 1, 2
_AT_EMPTY_PATH = 0x1000
_MAX_HANDLE_BYTES = 128
_BUFFER_BYTES = 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("handle", ctypes.c_ubyte * _MAX_HANDLE_BYTES)]


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@dataclass(slots=True)
class Change:
    """What is known of a path that changed: whether it may be a directory that was not there before, which files it led to."""

    is_new: bool = False
    handles: set[bytes] = field(default_factory=set)


class Watch:
    """Collects the changed names of directories that it was told of.

    Raises (constructor): OSError where that cannot be had: it takes Linux 5.17 and a file system whose files have handles.
    """

    def __init__(self, root: Path) -> None:
        flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_UNLIMITED_QUEUE
        flags |= _FAN_REPORT_FID | _FAN_REPORT_DIR_FID | _FAN_REPORT_NAME | _FAN_REPORT_TARGET_FID
        self._fd = _check(_libc.fanotify_init(flags, os.O_RDONLY))
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC)
        self._root = -1
        try:
            self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.inode_of(_handle(self._root))  # a handle that cannot be opened would be found out too late
            _check(_libc.fanotify_mark(self._fd, _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM, _MASK, -100, os.fsencode(root)))
        except BaseException:
            self._close_all()
            raise
        self._directories: dict[bytes, bytes] = {}  # handle -> path
        self._changed: dict[bytes, Change] = {}
        self._overflowed = False
        self._lock = threading.Lock()
        # What others do on the same file system is read away as it comes, or it would pile up.
        self._reader = threading.Thread(target=self._read_away, name="changes", daemon=True)
        self._reader.start()

    def close(self) -> None:
        """Stop. Idempotent."""
        if self._fd < 0:
            return
        os.write(self._woken, b"x")
        self._reader.join()
        self._close_all()

    def _close_all(self) -> None:
        for fd in (self._fd, self._wake, self._woken, self._root):
            if fd >= 0:
                os.close(fd)
        self._fd = -1

    def directory(self, fd: int, path: bytes) -> None:
        """Tell of a directory before it is looked at: from now on its changes count as changes of `path`. Raises: OSError."""
        handle = _handle(fd)
        with self._lock:
            self._directories[handle] = path

    def take(self) -> dict[bytes, Change] | None:
        """Return what changed since the last call, by its path, "." for the root itself; None when something was lost."""
        with self._lock:
            self._read()
            changed, self._changed = self._changed, {}
            overflowed, self._overflowed = self._overflowed, False
        return None if overflowed else changed

    def inode_of(self, handle: bytes) -> tuple[int, int] | None:
        """Return (device, inode) of what had a name; None when it is gone. Raises: OSError."""
        size, kind = struct.unpack_from("=Ii", handle)
        given = _Handle(size, kind, (ctypes.c_ubyte * _MAX_HANDLE_BYTES)(*handle[8:]))
        try:
            fd = _check(_libc.open_by_handle_at(self._root, ctypes.byref(given), os.O_PATH | os.O_CLOEXEC))
        except OSError as e:
            if e.errno == errno.ESTALE:
                return None
            raise
        try:
            st = os.fstat(fd)
            return st.st_dev, st.st_ino
        finally:
            os.close(fd)

    def _read_away(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._wake in ready:
                return
            with self._lock:
                self._read()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._fd, _BUFFER_BYTES)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno == errno.EINTR:
                    continue
                self._overflowed = True
                return
            at = 0
            while at < len(data):
                at += self._event(data, at)

    def _event(self, data: bytes, at: int) -> int:
        """Take one event; return its length."""
        length, _, _, head, mask = struct.unpack_from("=IBBHQ", data, at)
        if mask & _FAN_Q_OVERFLOW:
            self._overflowed = True
            return int(length)
        info, end = at + head, at + length
        path, target = None, b""
        while info < end:
            kind, _, size = struct.unpack_from("=BBH", data, info)
            (count,) = struct.unpack_from("=I", data, info + 12)
            handle = data[info + 12 : info + 20 + count]
            if kind == _INFO_DFID_NAME and (directory := self._directories.get(handle)) is not None:
                name = data[info + 20 + count : info + size].split(b"\0")[0]
                path = directory if name == b"." else name if directory == b"." else directory + b"/" + name
                if mask & (_FAN_CREATE | _FAN_DELETE | _FAN_MOVED_FROM | _FAN_MOVED_TO):
                    self._changed.setdefault(directory, Change())  # its times
            elif kind == _INFO_FID:
                target = handle
            info += size
        if path is not None:
            change = self._changed.setdefault(path, Change())
            if not mask & _FAN_ONDIR:
                change.handles.add(target)
            elif mask & (_FAN_CREATE | _FAN_MOVED_TO):
                change.is_new = True
        return int(length)


def _handle(fd: int) -> bytes:
    """Return what the kernel calls a directory in its events: size, type and bytes of its handle. Raises: OSError."""
    handle = _Handle(bytes=_MAX_HANDLE_BYTES)
    mount = ctypes.c_int()
    _check(_libc.name_to_handle_at(fd, b"", ctypes.byref(handle), ctypes.byref(mount), _AT_EMPTY_PATH))
    return bytes(handle)[: 8 + handle.bytes]
