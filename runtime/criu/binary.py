"""Which criu is used: $FERRY_CRIU, else the one that was installed beside this runtime, else the one on PATH."""

from __future__ import annotations

import os
import shutil
import sys

from runtime.errors import CriuMissing


def find() -> str:
    """Return the path of criu. Raises: CriuMissing."""
    named = os.environ.get("FERRY_CRIU")
    if named:
        if os.access(named, os.X_OK):
            return named
        raise CriuMissing(f"criu {named} cannot be executed", hint="it is named by $FERRY_CRIU or --criu")
    beside = f"{sys.prefix}/bin/criu"
    found = beside if os.access(beside, os.X_OK) else shutil.which("criu", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not found:
        raise CriuMissing("criu is not installed", hint="run scripts/install-criu, or name one with $FERRY_CRIU")
    return found
