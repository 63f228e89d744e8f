"""Checkpoint and restore against runc with the same CRIU: `make bench-checkpoint`.

For each size of memory, with the images on a tmpfs:

* pause: what the container itself sees of `checkpoint --leave-running`, the longest time between two of its own stamps, less its
  own sleep; beside it CRIU's own figure (frozen_time), and what remains: ours, or runc's.
* dump: `checkpoint`, from its start to its end.
* back: from the start of `restore` to the first stamp of the restored container; eagerly, and lazily from the local images.
* drained: until the lazy restore's memory is all there.

The two sides alternate; medians are printed. `--rounds N` (default 3), `--sizes MIB...` (default 16 256 1024 4096).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from runtime.criu import images as image_files  # noqa: E402
from tests.helpers.bundle import BundleMaker  # noqa: E402
from tests.helpers.memory import system  # noqa: E402
from tests.helpers.oci import CRIU, OURS  # noqa: E402

NAME = "bench"
SLEEP_MS = 2
PROGRAM = (
    "import os, time; m = [bytearray(os.urandom(4096) * 256) for _ in range({mib})]; n = 0; f = open('/count', 'a', 1)\n"
    "while True: n += 1; f.write('%d %.5f\\n' % (n, time.time())); time.sleep({sleep})"
)
null = subprocess.DEVNULL


class Side:
    """One runtime with a state of its own."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._argv = {
            "ferry": [OURS, "--root", str(directory / "ferry")],
            "runc": ["runc", "--root", str(directory / "runc"), "--criu", CRIU],
        }[name]

    def __call__(self, *args: str | Path) -> float:
        """Run a verb; return the milliseconds that it took."""
        started = time.monotonic()
        subprocess.run([*self._argv, *map(str, args)], stdin=null, stdout=null, stderr=null, check=True)
        return (time.monotonic() - started) * 1000

    def delete(self) -> None:
        subprocess.run([*self._argv, "delete", "--force", NAME], stdin=null, stdout=null, stderr=null, check=False)


def stamps(count: Path) -> list[float]:
    text = count.read_text() if count.exists() else ""
    return [float(line.split()[1]) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_stamps(count: Path, more_than: int) -> None:
    deadline = time.monotonic() + 300
    while len(stamps(count)) <= more_than:
        assert time.monotonic() < deadline, "no stamp came"
        time.sleep(0.001)


@contextlib.contextmanager
def place(gib: int) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="ferry-bench-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={gib}g", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)
        directory.rmdir()


def back(side: Side, bundle: Path, images: Path, *, lazy: bool) -> tuple[float, float]:
    """Restore; return the ms until the container wrote a stamp, and until all its memory was there."""
    count = bundle / "rootfs/count"
    before = len(stamps(count))
    daemon = None
    started = time.monotonic()
    options: list[str | Path] = ["--lazy-pages"] if lazy else []
    if lazy and side.name == "runc":
        # runc leaves the daemon to its caller.
        daemon = subprocess.Popen([CRIU, "lazy-pages", "-D", images, "-W", images], stdin=null, stdout=null, stderr=null)
        while not (images / "lazy-pages.socket").exists():
            time.sleep(0.001)
    side("restore", "--detach", *options, "--bundle", bundle, "--image-path", images, "--work-path", images, NAME)
    wait_stamps(count, before)
    elapsed = (time.monotonic() - started) * 1000
    if daemon is not None:
        daemon.wait()
    elif lazy:
        while _daemon_of(images):
            time.sleep(0.002)
    return elapsed, (time.monotonic() - started) * 1000


def _daemon_of(images: Path) -> bool:
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"lazy-pages" in words and os.fsencode(images) in words:
                return True
    return False


def measure(side: Side, bundle: Path, directory: Path) -> dict[str, float]:
    count = bundle / "rootfs/count"
    count.unlink(missing_ok=True)
    images = directory / "images"
    side("run", "--detach", "--bundle", bundle, NAME)
    try:
        wait_stamps(count, 50)
        since = len(stamps(count))
        side("checkpoint", "--leave-running", "--image-path", images, "--work-path", images, NAME)
        wait_stamps(count, len(stamps(count)) + 5)
        pause = max((b - a) * 1000 for a, b in pairwise(stamps(count)[since - 1 :])) - SLEEP_MS
        criu = image_files.stats(images, "dump")["frozen_time"] / 1000
        shutil.rmtree(images)
        dump = side("checkpoint", "--image-path", images, "--work-path", images, NAME)
        eager, _ = back(side, bundle, images, lazy=False)
        side.delete()
        lazy, drained = back(side, bundle, images, lazy=True)
        return {
            "pause": pause,
            "criu": criu,
            "rest": pause - criu,
            "dump": dump,
            "eager": eager,
            "lazy": lazy,
            "drained": drained,
        }
    finally:
        side.delete()
        shutil.rmtree(images, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 256, 1024, 4096])
    options = parser.parse_args()
    print(f"Medians of {options.rounds} rounds, in ms")
    columns = ("pause", "criu", "rest", "dump", "eager", "lazy", "drained")
    words = ("pause", "of it CRIU", "the rest", "dump", "back, eager", "back, lazy", "drained")
    print(f"{'memory':10} {'':6}" + "".join(f"{w:>13}" for w in words))
    for mib in options.sizes:
        with place(2 * mib // 1024 + 2) as directory:
            sides = [Side(name, directory) for name in ("ferry", "runc")]
            program = PROGRAM.format(mib=mib, sleep=SLEEP_MS / 1000)
            bundle = BundleMaker(directory)("/usr/bin/python3", "-c", program, change=system)
            found: dict[str, list[dict[str, float]]] = {s.name: [] for s in sides}
            for n in range(options.rounds):
                for side in sides if n % 2 else reversed(sides):
                    found[side.name].append(measure(side, bundle, directory))
        medians: dict[str, dict[str, Any]] = {
            name: {c: statistics.median(r[c] for r in rows) for c in columns} for name, rows in found.items()
        }
        for name, row in medians.items():
            print(f"{f'{mib} MiB':10} {name:6}" + "".join(f"{row[c]:13.0f}" for c in columns), flush=True)
        ratios = {c: medians["ferry"][c] / medians["runc"][c] for c in columns}
        print(f"{'':10} {'ratio':6}" + "".join(f"{ratios[c]:13.2f}" for c in columns), flush=True)


if __name__ == "__main__":
    main()
