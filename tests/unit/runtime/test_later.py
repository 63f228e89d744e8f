"""What is sent of memory that comes later, in which order, and what is taken for it at the other end."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import ContainerError
from runtime.memory import later, records
from runtime.memory.later import Arrivals, Server
from runtime.memory.records import PAGE_BYTES

PAGES = 512


@pytest.fixture
def memory() -> Iterator[int]:
    """Pages of our own, each of which holds its number."""
    own = mmap.mmap(-1, PAGES * PAGE_BYTES)
    for number in range(PAGES):
        own[number * PAGE_BYTES : number * PAGE_BYTES + 4] = number.to_bytes(4, "little")
    view = ctypes.c_char.from_buffer(own)
    yield ctypes.addressof(view)
    del view


def sent(path: Path) -> list[int]:
    """Return the numbers of the pages in a file of records, in their order."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        regions = records.parse(data[at : at + PAGE_BYTES])
        at += PAGE_BYTES
        for region in regions:
            found += [int.from_bytes(data[at + k * PAGE_BYTES : at + k * PAGE_BYTES + 4], "little") for k in range(region.pages)]
            at += region.pages * PAGE_BYTES
    return found


def test_what_is_asked_for_comes_first_and_nothing_twice(memory: int, tmp_path: Path) -> None:
    path = tmp_path / "content"
    with path.open("wb", buffering=0) as f:
        server = Server(f.fileno(), {3: (os.getpid(), [(memory, memory + PAGES * PAGE_BYTES)])})
        server.hear(f"page 3 {memory + 400 * PAGE_BYTES:x}")
        while server.may_send:
            server.go_on()
        assert not server.through, "it goes on only when some of it was used"
        server.hear(f"page 3 {memory + 401 * PAGE_BYTES:x}")
        server.hear(f"page 3 {memory + 450 * PAGE_BYTES:x}")
        server.hear(f"page 4 {memory:x}")
        while not server.through:
            server.hear(f"ack {path.stat().st_size}")
            server.go_on()
        assert server.end().pages == PAGES
    found = sent(path)
    assert sorted(found) == list(range(PAGES)) and found[0] == 400
    assert found.index(450) < found.index(300)


def test_words_that_are_none(memory: int, tmp_path: Path) -> None:
    with (tmp_path / "content").open("wb", buffering=0) as f:
        server = Server(f.fileno(), {3: (os.getpid(), [(memory, memory + PAGE_BYTES)])})
        for word in ("page", "page 3", "page x 1", "page 3 1001", "ack", "ack 1 2", "pages 3 1", "go"):
            with pytest.raises(ContainerError, match="says nothing of memory"):
                server.hear(word)
        server.hear("enough")
        assert server.through and not server.may_send


def test_what_has_come_so_far(memory: int, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "requests")
    with pytest.raises(ContainerError, match="nobody can be asked"):
        Arrivals(tmp_path, {}, tmp_path / "requests")
    asked = os.open(tmp_path / "requests", os.O_RDONLY | os.O_NONBLOCK)
    pages = {3: [(0, 2 * PAGE_BYTES)]}
    later.note(tmp_path, pages)
    assert later.noted(tmp_path) == pages
    arrivals = Arrivals(tmp_path, pages, tmp_path / "requests")
    assert list(arrivals.take()) == [] and arrivals.ask(3, PAGE_BYTES)
    whole = records.head([records.Region(3, 0, 2)]) + b"a" * PAGE_BYTES + b"b" * PAGE_BYTES + records.END
    content = tmp_path / later.CONTENT_FILE
    content.write_bytes(whole[: 2 * PAGE_BYTES + 100])
    assert list(arrivals.take()) == [], "a record that is not whole is none"
    content.write_bytes(whole)
    assert list(arrivals.take()) == [(3, 0, 2 * PAGE_BYTES, PAGE_BYTES)] and arrivals.through
    assert ctypes.string_at(arrivals.content(2 * PAGE_BYTES, PAGE_BYTES), 2) == b"bb"
    arrivals.enough()
    assert os.read(asked, 1000).split(b"\n") == [b"page 3 1000", b"enough", b""]
    os.close(asked)
