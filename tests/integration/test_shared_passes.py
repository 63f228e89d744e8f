"""What is sent of shared memory, told by what it holds: of this process's own."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.memory import records
from runtime.memory.records import PAGE_BYTES, SHARED
from runtime.memory.sender import Sender
from runtime.memory.shared import Shared, mapped

pytestmark = pytest.mark.ferry
MIB = 1 << 20


class Way:
    """What is sent, in a file."""

    def __init__(self, path: Path) -> None:
        self._fd, self._at = os.open(path, os.O_RDWR | os.O_CREAT), 0
        self.sender, self.shared = Sender(self._fd), Shared()

    def send(self) -> dict[tuple[int, int], bytes]:
        """Send what changed; return what came: number and offset -> page."""
        self.shared.send(mapped([os.getpid()]), self.sender)
        found, end = {}, os.fstat(self._fd).st_size
        while self._at < end:
            regions = records.parse(os.pread(self._fd, PAGE_BYTES, self._at))
            self._at += PAGE_BYTES
            for region in regions:
                for offset in range(region.start, region.end, PAGE_BYTES):
                    found[region.pid, offset] = os.pread(self._fd, PAGE_BYTES, self._at)
                    self._at += PAGE_BYTES
        return found


@pytest.fixture
def way(tmp_path: Path) -> Iterator[Way]:
    yield Way(tmp_path / "stream")


def test_what_changed_goes(way: Way) -> None:
    memory = mmap.mmap(-1, 8 * MIB)
    memory[: 2 * MIB] = os.urandom(2 * MIB)
    first = way.send()
    assert len(first) == 2 * MIB // PAGE_BYTES and {n for n, _ in first} == {SHARED + 1}
    assert way.send() == {}
    memory[5 * MIB] = 1
    memory[MIB + 77] ^= 1
    again = way.send()
    assert sorted(o for _, o in again) == [
        *range(MIB, MIB + 4 * PAGE_BYTES, PAGE_BYTES),
        *range(5 * MIB, 5 * MIB + 4 * PAGE_BYTES, PAGE_BYTES),
    ]
    assert again[SHARED + 1, MIB] == memory[MIB : MIB + PAGE_BYTES]
    (segment,) = way.shared.segments.values()
    assert segment.sent == [(0, 2 * MIB), (5 * MIB, 5 * MIB + 4 * PAGE_BYTES)]


def test_nothing_of_it_is_kept(way: Way) -> None:
    """Memory that the container lets go of would stay, were it open here."""
    before = os.listdir("/proc/self/fd")
    memory = mmap.mmap(-1, MIB)
    memory[0] = 1
    way.send()
    assert os.listdir("/proc/self/fd") == before
    memory.close()
    way.send()
    assert way.shared.segments == {}


def test_little_in_much(way: Way) -> None:
    """A memory of few pages may be of any size."""
    fd = os.memfd_create("large")
    os.ftruncate(fd, 1 << 43)
    os.pwrite(fd, b"x", 1 << 42)
    memory = mmap.mmap(fd, PAGE_BYTES)
    assert [o for _, o in way.send()] == [(1 << 42) + i * PAGE_BYTES for i in range(4)]
    for at in range(0, 1 << 30, 1 << 18):
        os.pwrite(fd, b"y", at)
    assert len(way.send()) == 4 * 4096
    memory.close()
    os.close(fd)


def test_a_name_does_not_make_it_one(way: Way, tmp_path: Path) -> None:
    path = tmp_path / "SYSV-mine"
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as f, mmap.mmap(f.fileno(), MIB):
        assert way.send() == {}
