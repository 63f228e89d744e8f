"""A stream over several connections is one stream: its bytes come in the order in which they went."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading

import pytest

from migrate.errors import ConnectionLost
from migrate.transport.local import FdStream
from migrate.transport.striped import STRIPE_BYTES, Receiving, Sending


def lanes(count: int) -> tuple[list[FdStream], list[FdStream]]:
    pairs = [socket.socketpair() for _ in range(count)]

    def stream(end: socket.socket) -> FdStream:
        fd = end.detach()
        return FdStream(os.dup(fd), fd, "the other end")

    return [stream(a) for a, _ in pairs], [stream(b) for _, b in pairs]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_there_and_back(count: int) -> None:
    near, far = lanes(count)
    sending, receiving = Sending(near), Receiving(far)
    r = random.Random(count)
    data = r.randbytes(5 * count * STRIPE_BYTES + 12345)

    def write() -> None:
        at = 0
        while at < len(data):
            size = r.choice([1, 4, 1000, STRIPE_BYTES, STRIPE_BYTES + 1, 3 * STRIPE_BYTES])
            sending.write(memoryview(data)[at : at + size])
            at += size

    writer = threading.Thread(target=write)
    writer.start()
    found, chosen = bytearray(), random.Random(0)
    while len(found) < len(data):
        buffer = bytearray(min(chosen.choice([1, 100, STRIPE_BYTES, 2 * STRIPE_BYTES]), len(data) - len(found)))
        receiving.read_into(memoryview(buffer))
        found += buffer
    writer.join(60)
    assert found == data
    receiving.write(b"answer")
    answer = bytearray(6)
    sending.read_into(memoryview(answer))
    assert answer == b"answer"
    sending.close()
    receiving.close()


@pytest.mark.parametrize("broken", [0, 1])
def test_one_that_breaks_breaks_all(broken: int) -> None:
    near, far = lanes(2)
    sending, receiving = Sending(near), Receiving(far)
    sending.write(bytes(100))
    far[broken].close()
    reader = threading.Thread(target=_drain, args=(far[1 - broken],), daemon=True)
    reader.start()
    with pytest.raises(ConnectionLost):
        sending.write(bytes(3 * STRIPE_BYTES))
    sending.close()
    reader.join(30)
    with pytest.raises(ConnectionLost):
        receiving.read_into(memoryview(bytearray(STRIPE_BYTES)))
    receiving.close()


def _drain(stream: FdStream) -> None:
    with contextlib.suppress(ConnectionLost):
        while True:
            stream.read_into(memoryview(bytearray(100)))


def test_a_stream_is_closed_once() -> None:
    """Its descriptors may be somebody else's by then."""
    (near, *_), (far, *_) = lanes(1)
    first, second = near.fds
    near.close()
    again = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]
    assert set(again) == {first, second}
    near.close()
    for fd in again:
        os.close(fd)
    far.close()
