"""What the kernel tells of the unix sockets in this network namespace, and no file below /proc does.

Source: sock_diag(7), unix_diag.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from runtime.values import Value

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SHOW_VFS, _SHOW_PEER, _SHOW_ICONS = 2, 4, 8
_VFS, _PEER, _ICONS = 1, 2, 3
_ESTABLISHED = 1  # tcp_states.h, which unix sockets borrow
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=BBBxIII")  # family, type, state, inode, cookie


class UnixSocket(Value):
    """`peer` is an inode, 0 for one that is not accepted yet; `waiting` are the inodes of those that this one has to accept."""

    connected: bool
    peer: int
    waiting: tuple[int, ...]


def unix_sockets() -> dict[int, UnixSocket]:
    """Return the sockets by their inodes. Raises: OSError where there is no unix_diag."""
    sockets = {}
    for inode, state, found in _sockets(_SHOW_PEER | _SHOW_ICONS):
        waiting = found.get(_ICONS, b"")
        (peer,) = struct.unpack_from("=I", found.get(_PEER, bytes(4)))
        connected = state == _ESTABLISHED and (_PEER in found or peer != 0)
        sockets[inode] = UnixSocket(connected, peer, struct.unpack(f"={len(waiting) // 4}I", waiting))
    return sockets


def bound_at(path: str) -> bool:
    """Say whether a socket is bound to this name; its file alone may be left over. Raises: OSError."""
    there = os.stat(path)
    wanted = there.st_ino & 0xFFFFFFFF, os.major(there.st_dev) << 20 | os.minor(there.st_dev)
    return any(struct.unpack_from("=II", found[_VFS]) == wanted for _, _, found in _sockets(_SHOW_VFS) if _VFS in found)


def _sockets(show: int) -> Iterator[tuple[int, int, dict[int, bytes]]]:
    """Return inode, state and attributes of each socket."""
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, show, 0xFFFFFFFF, 0xFFFFFFFF)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as s:
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
        s.send(header + request)
        while True:
            data = s.recv(1 << 17)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, *_ = _HEADER.unpack_from(data, at)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (number,) = struct.unpack_from("=i", data, at + _HEADER.size)
                    raise OSError(-number, "unix_diag")
                _, _, state, inode, _, _ = _MESSAGE.unpack_from(data, at + _HEADER.size)
                yield inode, state, _attributes(data[at + _HEADER.size + _MESSAGE.size : at + length])
                at += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        found[kind] = data[at + 4 : at + max(length, 4)]
        at += (max(length, 4) + 3) & ~3
    return found
