"""What a last look at a container's files costs in the freeze: only where the kernel told of changes, against at all of them.

    .venv/bin/python tests/bench/files.py [FILES [CHANGED]]

Both on the same tree in the same run, in turns; medians. Needs root, for fanotify.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from migrate.tree import Tree

_ROUNDS = 7


def main(files: int, changed: int) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        root = Path(name)
        for i in range(files):
            if i % 100 == 0:
                (root / f"d{i // 100}").mkdir()
            (root / f"d{i // 100}/f{i}").write_bytes(b"x" * 100)
        time.sleep(0.1)
        trees = {"where it changed": Tree(root), "at all of it": Tree(root, watched=False)}
        took: dict[str, list[float]] = {what: [] for what in trees}
        first = {}
        for what, tree in trees.items():
            started = time.perf_counter()
            tree.look()
            first[what] = time.perf_counter() - started
            if tree.reason:
                sys.exit(f"files.py: {tree.reason}")
        for n in range(_ROUNDS):
            time.sleep(0.2)
            for tree in trees.values():
                tree.look()
            for i in range(changed):
                (root / f"d{i % (files // 100)}/f{i % (files // 100) * 100}").write_bytes(b"y" * (100 + n))
            for what, tree in trees.items():
                started = time.perf_counter()
                tree.look()
                took[what].append(time.perf_counter() - started)
        for tree in trees.values():
            tree.close()
    print(f"{files} files, of which {changed} changed, median of {_ROUNDS}; the first look in brackets")
    for what, times in took.items():
        print(f"  a look {what:17} {median(times) * 1000:9.2f} ms  ({first[what] * 1000:.0f} ms)")
    print(f"  {median(took['at all of it']) / median(took['where it changed']):.0f} times less")


if __name__ == "__main__":
    main(*(int(a) for a in [*sys.argv[1:], *("100000", "20")[len(sys.argv) - 1 :]]))
