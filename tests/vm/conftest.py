from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.helpers.vms import Vms


@pytest.fixture(scope="session")
def vms() -> Iterator[Vms]:
    """Two guests, booted once."""
    bed = Vms(f"test-{os.getpid()}")
    try:
        bed.up()
        yield bed
    finally:
        bed.down()
