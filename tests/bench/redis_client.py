"""Clients of a Redis that is moved: they tell what they saw of it as one JSON object, when their standard input ends.

redis_client.py fill ADDRESS MIB RATE      random values of 4 KiB, as many as that takes; ends by itself
redis_client.py load ADDRESS MIB RATE      so many values of 1 KiB a second are written over at random; 0: as fast as it answers
redis_client.py probe ADDRESS MIB RATE     one INCR after the other; each answer must be the next number
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import sys
import time

PORT = 6379
FILL_BYTES, LOAD_BYTES = 4096, 1024
Connection = tuple[socket.socket, "Answers"]


class Answers:
    """Reads answers of one line each."""

    def __init__(self, s: socket.socket) -> None:
        self._socket, self._buffer = s, b""

    def take(self, count: int) -> list[bytes]:
        """Return the next ones. Raises: SystemExit for a connection that was closed, or an answer that is an error."""
        lines = self._buffer.split(b"\r\n")
        while len(lines) <= count:
            data = self._socket.recv(1 << 16)
            if not data:
                sys.exit("the connection was closed")
            lines[-1:] = (lines[-1] + data).split(b"\r\n")
        self._buffer = b"\r\n".join(lines[count:])
        if wrong := [line for line in lines[:count] if line.startswith(b"-")]:
            sys.exit(f"Redis says {wrong[0].decode()}")
        return lines[:count]


def connect(address: str) -> Connection:
    s = socket.create_connection((address, PORT), timeout=600)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s, Answers(s)


def command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)


def ended() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def fill(connection: Connection, mib: int) -> None:
    s, answers = connection
    for first in range(0, mib * 256, 256):
        s.sendall(b"".join(command(b"SET", b"k%d" % i, os.urandom(FILL_BYTES)) for i in range(first, first + 256)))
        answers.take(256)


def load(connection: Connection, rate: int, mib: int) -> dict[str, list[tuple[float, int]]]:
    """Write; return how many writes were answered, as (time of the day in s, count), about every 50 ms."""
    s, answers = connection
    value, keys, rng = os.urandom(LOAD_BYTES), mib * 256, random.Random(7)
    done, seen, began = 0, [(time.time(), 0)], time.monotonic()
    while not ended():
        due = 64 if not rate else min(int((time.monotonic() - began) * rate) - done, 256)
        if due <= 0:
            time.sleep(0.002)
            continue
        s.sendall(b"".join(command(b"SETRANGE", b"k%d" % rng.randrange(keys), b"0", value) for _ in range(due)))
        answers.take(due)
        done += due
        if time.time() - seen[-1][0] >= 0.05:
            seen.append((time.time(), done))
    return {"seen": seen}


def probe(connection: Connection) -> dict[str, list[float]]:
    """Ask; return when each answer came, as the time of the day in s."""
    s, answers = connection
    seen: list[float] = []
    while not ended():
        s.sendall(command(b"INCR", b"probe"))
        (answer,) = answers.take(1)
        seen.append(time.time())
        if answer != b":%d" % len(seen):
            sys.exit(f"answer {len(seen)} is {answer.decode()}")
        time.sleep(0.001)
    return {"seen": seen}


def main() -> None:
    what, address, mib, rate = sys.argv[1:]
    connection = connect(address)
    if what == "fill":
        fill(connection, int(mib))
    else:
        print("connected", flush=True)
        print(json.dumps(load(connection, int(rate), int(mib)) if what == "load" else probe(connection)))


if __name__ == "__main__":
    main()
