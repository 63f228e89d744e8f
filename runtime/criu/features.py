"""Whether this host's CRIU can do what Ferry asks of it, as far as that shows without a container."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache

from runtime.criu import binary, session
from runtime.errors import CriuError

# Kernel release -> the oldest CRIU that works there. 4.1 is what dumping a frozen cgroup takes; 6.13 moved the vDSO,
# and 6.16 refuses a socket option that older ones read.
_NEEDED = (((6, 16), (4, 2, 0)), ((6, 13), (4, 1, 1)), ((0, 0), (4, 1, 0)))


def needed(kernel: str) -> tuple[int, int, int]:
    """Return the oldest CRIU version for a kernel release. Pure."""
    found = re.match(r"(\d+)\.(\d+)", kernel)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    return next(criu for since, criu in _NEEDED if release >= since)


def examine() -> dict[str, str]:
    """Return annotations for the features document: CRIU's version, and what is wrong with it."""
    try:
        version = session.version()
        found = {"org.criu.version": ".".join(map(str, version)), "org.criu.path": binary.find()}
    except CriuError as e:
        return {"org.criu.error": str(e)}
    kernel = platform.release()
    if version < needed(kernel):
        minimum = ".".join(map(str, needed(kernel)))
        return {
            **found,
            "org.criu.error": f"CRIU {found['org.criu.version']} is too old: kernel {kernel} needs {minimum}",
        }
    check = subprocess.run(
        [found["org.criu.path"], "check"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if check.returncode:
        lines = [line for line in check.stderr.splitlines() if "Error" in line and "rlimit" not in line]
        return {**found, "org.criu.error": f"criu check fails: {lines[-1] if lines else 'no reason given'}"}
    try:
        return {**found, "org.criu.features": ",".join(sorted(n for n, there in session.check_features().items() if there))}
    except CriuError:
        return found


@cache
def tracks_memory() -> bool:
    """Say whether the kernel tells which pages were written to, as CRIU's own pre-dumps need it. Raises: CriuError."""
    return session.check_features()["mem_track"]
