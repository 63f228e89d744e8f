"""Which sockets the kernel knows of in this network namespace that no file below /proc tells of: the peers of unix sockets.

Source: sock_diag(7), unix_diag.h.
"""

from __future__ import annotations

import socket
import struct

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_PEER = 4
_UNIX_DIAG_PEER = 2
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=BBBxIII")  # family, type, state, inode, cookie


def unix_peers() -> dict[int, int]:
    """Return inode -> inode of its peer, for the unix sockets that have one.

    Raises: OSError where the kernel has no unix_diag.
    """
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_PEER, 0xFFFFFFFF, 0xFFFFFFFF)
    peers: dict[int, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as s:
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
        s.send(header + request)
        while True:
            data = s.recv(1 << 17)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, *_ = _HEADER.unpack_from(data, at)
                if kind == _NLMSG_DONE:
                    return peers
                if kind == _NLMSG_ERROR:
                    (number,) = struct.unpack_from("=i", data, at + _HEADER.size)
                    raise OSError(-number, "unix_diag")
                _, _, _, inode, _, _ = _MESSAGE.unpack_from(data, at + _HEADER.size)
                if peer := _attribute(data[at + _HEADER.size + _MESSAGE.size : at + length]):
                    peers[inode] = peer
                at += (length + 3) & ~3


def _attribute(data: bytes) -> int:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if kind == _UNIX_DIAG_PEER:
            return int(struct.unpack_from("=I", data, at + 4)[0])
        at += (max(length, 4) + 3) & ~3
    return 0
