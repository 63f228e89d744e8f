from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.fault.oracle import ENV, FLAGS, NAME, World
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
def places(world: World) -> list[str]:
    """The entries of a move, before and after, in order: of one that nothing happens to."""
    world.begin()
    listing = "/var/lib/passed"
    done = world.bed.run("host1", "env", *ENV, f"FERRY_FAULT_LIST={listing}", "migrate", "move", *FLAGS, NAME, "host2")
    assert done.returncode == 0, done.stderr
    found = world.bed.path("host1", listing).read_text().split()
    world.at = "host2"
    world.counts()
    only = os.environ.get("FERRY_FAULT_PLACES", "")
    return [p for p in dict.fromkeys(found) if not only or any(word in p for word in only.split(","))]
