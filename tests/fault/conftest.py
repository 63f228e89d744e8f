from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.fault.oracle import ENV, NAME, World
from tests.helpers.bed import Bed


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    bed = Bed(f"fault-{os.getpid()}")
    bed.up("--disks")
    try:
        world = World(bed)
        yield world
        world.close()
    finally:
        bed.down()


@pytest.fixture(scope="module")
def places(world: World) -> Callable[[], list[str]]:
    """What returns the entries of a move, before and after, in order: of one that nothing happens to, of the world's kind."""
    known: dict[frozenset[str], list[str]] = {}
    listing = "/var/lib/passed"

    def passed() -> list[str]:
        if world.ways not in known:
            world.begin()
            world.bed.path("host1", listing).unlink(missing_ok=True)
            command = ("migrate", "move", *world.flags, NAME, "host2")
            done = world.bed.run("host1", "env", *ENV, f"FERRY_FAULT_LIST={listing}", *command)
            assert done.returncode == 0, done.stderr
            found = world.bed.path("host1", listing).read_text().split()
            world.at = "host2"
            world.counts()
            only = os.environ.get("FERRY_FAULT_PLACES", "")
            known[world.ways] = [p for p in dict.fromkeys(found) if not only or any(word in p for word in only.split(","))]
        return known[world.ways]

    return passed
