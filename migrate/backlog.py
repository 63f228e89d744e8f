"""What comes for a container while it stands still: kept on the source, and handed to it on the target.

A segment that is lost comes again when its sender's timer has run out, which doubles each time, from 200 ms on: who waits for
an answer would see a pause of 250 ms as one of 600 ms. So nothing is lost. TCP drops what it has already.

Frames are read from the ports of the container's bridge, as they come in, and from the bridge itself, as this host sends
them: the container's own end is down by the time of the decision. On the target they are put into its end, where nobody but it
sees them.

Source: packet(7); PACKET_VNET_HDR keeps checksums that the kernel has not computed yet, and segments that it has joined.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterable
from typing import Any

from migrate.network import Interface

# (number of the interface, the frame in base64 with what the kernel knows of it before it)
Frames = list[tuple[int, str]]
# In one answer; what is more is lost, and comes again.
MAX_BYTES, MAX_FRAMES = 1 << 20, 4096
# With the release, for which the container waits: what most clients have sent by then.
AT_ONCE_BYTES = 64 << 10
_LARGEST = 70_000
_KERNEL_BYTES = 8 << 20
_HEADER_BYTES = 10  # struct virtio_net_hdr
_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_VNET_HDR, _SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 263, 15, 26, 33
_LOAD_WORD, _LOAD_HALF, _IF_EQUAL, _RETURN = 0x20, 0x28, 0x15, 0x06


def for_any_of(macs: Iterable[str]) -> list[tuple[int, int, int, int]]:
    """Return the BPF program that takes the frames to these addresses, whole, and no others. Pure.

    An instruction is (code, steps over when true, steps over when not, operand).
    """
    program = []
    for mac in macs:
        first, last = struct.unpack("!IH", _raw(mac))
        program += [(_LOAD_WORD, 0, 0, 0), (_IF_EQUAL, 0, 3, first), (_LOAD_HALF, 0, 0, 4), (_IF_EQUAL, 0, 1, last)]
        program.append((_RETURN, 0, 0, 0xFFFFFFFF))
    return [*program, (_RETURN, 0, 0, 0)]


def _raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


class Backlog:
    """Keeps what comes for the interfaces `ends` from the moment that it is made. Raises (constructor): OSError.

    `ports` are those of their bridges.
    """

    def __init__(self, ends: list[Interface], ports: Iterable[str]) -> None:
        self._numbers = {_raw(end.mac): k for k, end in enumerate(ends)}
        self._ports = set(ports) - {end.peer for end in ends}
        self._bridges = {end.bridge for end in ends}
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            program = b"".join(struct.pack("HBBI", *step) for step in for_any_of(end.mac for end in ends))
            kept = ctypes.create_string_buffer(program)
            fprog = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(kept))
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _KERNEL_BYTES)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            _listen_everywhere(self._socket)
        except BaseException:
            self._socket.close()
            raise

    def take(self, most_bytes: int = MAX_BYTES) -> Frames:
        """Return what has come since the last time, in its order, about so much of it at most."""
        found: Frames = []
        size = 0
        while size < most_bytes and len(found) < MAX_FRAMES:
            try:
                data, (device, _, kind, _, _) = self._socket.recvfrom(_LARGEST)
            except BlockingIOError:
                break
            except OSError:
                continue  # an interface went down
            comes_in = kind in (socket.PACKET_HOST, socket.PACKET_OTHERHOST) and device in self._ports
            number = self._numbers.get(data[_HEADER_BYTES : _HEADER_BYTES + 6])
            if number is not None and (comes_in or (kind == socket.PACKET_OUTGOING and device in self._bridges)):
                found.append((number, base64.b64encode(data).decode()))
                size += len(data)
        return found

    def close(self) -> None:
        self._socket.close()


def _listen_everywhere(sock: socket.socket) -> None:
    """Bind a packet socket to all interfaces, for which Python's own bind has no word. Raises: OSError."""
    address = struct.pack("HHiHBB8s", socket.AF_PACKET, socket.htons(_ETH_P_ALL), 0, 0, 0, 0, b"")
    if ctypes.CDLL(None, use_errno=True).bind(sock.fileno(), address, len(address)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def read(frames: Any, ends: list[Interface]) -> list[tuple[Interface, bytes]]:
    """Read what another host sent; what is no frame to one of the container's addresses is left out. Pure."""
    found = []
    for entry in frames[:MAX_FRAMES] if isinstance(frames, list | tuple) else ():
        try:
            number, text = entry
            end, data = ends[number], base64.b64decode(text, validate=True)
        except (TypeError, ValueError, IndexError, binascii.Error):
            continue
        if number >= 0 and len(data) <= _LARGEST and data[_HEADER_BYTES : _HEADER_BYTES + 6] == _raw(end.mac):
            found.append((end, data))
    return found


def deliver(frames: list[tuple[Interface, bytes]]) -> int:
    """Put frames into the container's interfaces; return how many. What cannot be put there is lost, and comes again."""
    done = 0
    sockets: dict[str, socket.socket] = {}
    try:
        for end, data in frames:
            with contextlib.suppress(OSError):
                if end.peer not in sockets:
                    sockets[end.peer] = sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
                    sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
                    sock.bind((end.peer, 0))
                sockets[end.peer].send(data)
                done += 1
    finally:
        for sock in sockets.values():
            sock.close()
    return done
