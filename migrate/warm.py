"""Have the memory that the downtime will need handed out before it begins.

In a virtual machine memory that was never used, or was given back to the host, costs many times as much at its first
touch as later. The images on both sides and the restored processes are all new memory: touched for the first
time inside the downtime, it would be most of it. What is touched and freed here shortly before is what the kernel
hands out next.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

MAX_BYTES = 4 << 30


def bytes_to_warm(wanted: int, available: int) -> int:
    """Return how much to touch: never more than a third of what is available. Pure."""
    return max(0, min(wanted, available // 3, MAX_BYTES))


def warm(wanted: int) -> int:
    """Touch and free up to `wanted` bytes; return how many. Never fails: without it only the downtime is longer."""
    size = bytes_to_warm(wanted, available_bytes())
    if size < mmap.PAGESIZE:
        return 0
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    try:
        mmap.mmap(-1, size, flags=flags).close()
    except (OSError, ValueError):
        return 0
    return size


def available_bytes() -> int:
    """Return how much memory programs may still ask for."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
