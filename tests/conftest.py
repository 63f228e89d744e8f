"""What all tests share: who may run which of them, and a bed that is made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.bed import Bed
from tests.helpers.bundle import BundleMaker, counter, numbers
from tests.helpers.leaks import Snapshot
from tests.helpers.oci import Oci, wait_for
from tests.helpers.served import Network


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ferry: what other runtimes do not have; left out when RUNTIME names one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    privileged = [i for i in items if "/unit/" not in str(i.path)]
    if privileged and os.geteuid() != 0:
        pytest.exit("integration and end-to-end tests need root; `make check` runs the others", returncode=1)
    if os.environ.get("RUNTIME"):
        left_out = [i for i in items if i.get_closest_marker("ferry")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if i not in left_out]


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
