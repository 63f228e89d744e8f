"""What the kernel tells of the unix sockets in this network namespace, and no file below /proc does.

Source: sock_diag(7), unix_diag.h.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_SHOW_VFS, _SHOW_PEER = 2, 4
_VFS, _PEER = 1, 2
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=BBBxIII")  # family, type, state, inode, cookie


def unix_peers() -> dict[int, int]:
    """Return inode -> inode of its peer, for the sockets that have one. Raises: OSError where there is no unix_diag."""
    return {inode: int(struct.unpack_from("=I", found[_PEER])[0]) for inode, found in _sockets(_SHOW_PEER) if _PEER in found}


def bound_at(path: str) -> bool:
    """Say whether a socket is bound to this name; its file alone may be left over. Raises: OSError."""
    inode = os.stat(path).st_ino & 0xFFFFFFFF
    return any(struct.unpack_from("=I", found[_VFS])[0] == inode for _, found in _sockets(_SHOW_VFS) if _VFS in found)


def _sockets(show: int) -> Iterator[tuple[int, dict[int, bytes]]]:
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
                _, _, _, inode, _, _ = _MESSAGE.unpack_from(data, at + _HEADER.size)
                yield inode, _attributes(data[at + _HEADER.size + _MESSAGE.size : at + length])
                at += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        found[kind] = data[at + 4 : at + max(length, 4)]
        at += (max(length, 4) + 3) & ~3
    return found
