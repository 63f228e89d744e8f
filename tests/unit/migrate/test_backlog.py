"""What of the network's frames is kept for a container, and what of another host's is believed."""

from __future__ import annotations

import base64
import ctypes
import socket
import struct

import pytest

from migrate.backlog import for_any_of, read
from migrate.network import Interface

A, B = "02:fe:00:00:01:20", "02:fe:00:00:01:21"
ENDS = [Interface("eth0", A, 1500, "web0", "br0"), Interface("eth1", B, 1500, "web1", "br0")]


def frame(mac: str, text: bytes = b"content") -> bytes:
    return bytes.fromhex(mac.replace(":", "")) + bytes(6) + b"\x08\x00" + text


@pytest.mark.parametrize("macs", [[A], [A, B], []])
def test_the_kernel_takes_what_is_for_it_alone(macs: list[str]) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    program = b"".join(struct.pack("HBBI", *step) for step in for_any_of(macs))
    kept = ctypes.create_string_buffer(program)
    there.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(kept)))
    there.setblocking(False)
    sent = [frame(m) for m in (A, B, "02:fe:00:00:01:22", "ff:ff:ff:ff:ff:ff", "02:fe:00:01:01:20")]
    for data in sent:
        here.send(data)
    seen = []
    while True:
        try:
            seen.append(there.recv(1000))
        except BlockingIOError:
            break
    assert seen == [frame(m) for m in macs]
    here.close()
    there.close()


def test_frames_for_the_container_are_read() -> None:
    text = base64.b64encode(bytes(10) + frame(B)).decode()
    assert read([[1, text]], ENDS) == [(ENDS[1], bytes(10) + frame(B))]
    assert read([], []) == []


@pytest.mark.parametrize(
    "frames",
    [
        None,
        "text",
        [1],
        [[0]],
        [[0, 7]],
        [["0", "QQ=="]],
        [[2, base64.b64encode(bytes(10) + frame(A)).decode()]],
        [[-1, base64.b64encode(bytes(10) + frame(B)).decode()]],
        [[0, "not base64!"]],
        [[0, base64.b64encode(bytes(10) + frame(B)).decode()]],
        [[0, base64.b64encode(bytes(10) + frame(A, bytes(100_000))).decode()]],
        [[0, ""]] * 5000,
    ],
)
def test_what_is_not_for_the_container_is_left_out(frames: object) -> None:
    assert read(frames, ENDS) == []
