"""What all tests share: who may run which of them, and a bed that is made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.bed import Bed, commits
from tests.helpers.bundle import BundleMaker, counter, numbers
from tests.helpers.leaks import Snapshot
from tests.helpers.oci import Oci, wait_for
from tests.helpers.served import Network

# How long one example takes says something about the machine only.
settings.register_profile("ferry", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ferry")

LONG = ("tests/integration/", "tests/e2e/", "tests/guest/", "tests/vm/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-minutes", type=float, default=1.0, help="how long tests/soak goes on")
    parser.addoption("--soak-seed", type=int, default=None, help="the faults of an earlier run again")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "v2: what is another thing on a host with cgroup v2 and systemd; run in a guest, too")
    config.addinivalue_line("markers", "ferry: what other runtimes do not have; left out when RUNTIME names one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    privileged = [i for i in items if "/unit/" not in str(i.path)]
    if privileged and os.geteuid() != 0:
        pytest.exit("integration and end-to-end tests need root; `make check` runs the others", returncode=1)
    left_out = {i for i in items if os.environ.get("RUNTIME") and i.get_closest_marker("ferry")}
    left_out |= _of_other_turns(items)
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [i for i in items if i not in left_out]


def _of_other_turns(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return what is not in this run's share: $FERRY_SHARE=3 runs every third one of the long tests, others with each commit."""
    shares = int(os.environ.get("FERRY_SHARE") or 1)
    long = [i for i in items if i.nodeid.startswith(LONG)]
    return {item for at, item in enumerate(long) if at % shares != commits() % shares}


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[Oci]:
    """The runtime under test with a state root of its own; at the end nothing may be left of what it made."""
    before = Snapshot.take()
    runtime = Oci(tmp_path / "state")
    yield runtime
    runtime.delete_all()
    assert Snapshot.take().more_than(before) == []


@pytest.fixture
def bundles(tmp_path: Path) -> BundleMaker:
    return BundleMaker(tmp_path)


@pytest.fixture
def counting(oci: Oci, bundles: BundleMaker) -> Path:
    """A container `c` that counts; its bundle."""
    bundle = bundles(*counter())
    oci.detached(bundle, "c")
    wait_for(lambda: len(numbers(bundle / "rootfs/count")) > 3, "counting")
    return bundle


@pytest.fixture
def network() -> Iterator[Network]:
    """A network namespace for a container, and one for its clients."""
    with Network(f"ferry-{os.getpid()}") as n:
        yield n


@pytest.fixture(scope="session")
def _bed() -> Iterator[Bed]:
    bed = Bed(f"test-{os.getpid()}")
    bed.up()
    yield bed
    bed.down()


@pytest.fixture
def bed(_bed: Bed) -> Iterator[Bed]:
    """Two hosts, as empty as when they were made."""
    _bed.clean()
    yield _bed
    _bed.clean()
