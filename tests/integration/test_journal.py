"""The journal of a move on a file system that is full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ferry


def test_a_full_disk_leaves_no_half_line() -> None:
    """A journal in a file system of one page that is full: the entry is refused, and what was there is whole."""
    script = (
        "import os, sys; from pathlib import Path; from migrate.journal import Journal, read; from migrate.errors import MigrateError\n"
        "d = Path(sys.argv[1]); j = Journal(d); j.append('plan', 'made')\n"
        "n = 0\n"
        "try:\n"
        "    while True: j.append('freeze', 'intent', filler='x' * 900); n += 1\n"
        "except MigrateError as e: assert 'No space left' in str(e) and 'disk full' in str(e), e\n"
        "entries, damaged = read(d / 'journal'); assert (len(entries), damaged) == (n + 1, 0), (len(entries), damaged)"
    )
    mount = 'mount -t tmpfs -o size=8k small "$1" && exec "$0" -c "$2" "$1"'
    argv = ["unshare", "-m", "sh", "-c", mount, sys.executable, "/mnt", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
