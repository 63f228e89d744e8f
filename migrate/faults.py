"""Where a test may stop the coordinator: around each entry of the journal, and nowhere else.

FERRY_FAULT=PHASE.MARK:before|after stops this process by SIGSTOP there, once; whoever set it looks on, breaks what it
wants to break, and lets it go on by SIGCONT.
"""

from __future__ import annotations

import os
import signal


def strike(entry: str, when: str) -> None:
    """Stop here if this is where it was asked for."""
    if os.environ.get("FERRY_FAULT") == f"{entry}:{when}":
        del os.environ["FERRY_FAULT"]
        os.kill(os.getpid(), signal.SIGSTOP)
