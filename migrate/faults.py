"""Where a test may stop the coordinator: around each entry of the journal, and nowhere else. And what it may have done twice.

FERRY_FAULT=PHASE.MARK:before|after stops this process by SIGSTOP there, once; whoever set it looks on, breaks what it
wants to break, and lets it go on by SIGCONT. FERRY_FAULT_LIST=FILE has the places that were passed written to a file.
FERRY_FAULT_TWICE=1 has every verb that may be repeated asked twice, as when the first answer was lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def around(entry: str) -> Iterator[None]:
    """Mark the writing of an entry."""
    _strike(entry, "before")
    yield
    _strike(entry, "after")


def twice() -> bool:
    """Say whether what may be repeated is."""
    return os.environ.get("FERRY_FAULT_TWICE") == "1"


def _strike(entry: str, when: str) -> None:
    place = f"{entry}:{when}"
    if listing := os.environ.get("FERRY_FAULT_LIST"):
        with open(listing, "a") as f:
            f.write(place + "\n")
    if os.environ.get("FERRY_FAULT") == place:
        del os.environ["FERRY_FAULT"]
        os.kill(os.getpid(), signal.SIGSTOP)
