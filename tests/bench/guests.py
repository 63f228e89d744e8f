"""Moves between two guests with a kernel each, which tracks dirty pages: `make bench-guests`.

A program with memory of its own, of which it writes so many pages a second, is moved by

* `migrate move --pre-copy always`;
* a loop of pre-dumps by `runtime` with the stop rule of P.Haul: at most 8, an end when less than 64 pages were written, or when it was
  over a tenth more than the time before; images over ssh after each, then a last dump, and the restore there;
* the same with runc and without a loop: checkpoint, images over ssh, restore.

The downtime is the longest pause between two time stamps that the program writes; the clocks of the guests are compared before. The
guests are emulated, many times slower than a machine: only ratios say something.

    guests.py [--rounds N] [--mib MIB] [--rates 100,1000]

Source of the rule: p.haul's iters.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.helpers import memory  # noqa: E402
from tests.helpers.bundle import BundleMaker  # noqa: E402
from tests.helpers.vms import NODES, Vms  # noqa: E402

BUNDLE, NAME = "/var/lib/ferry/bundles/bench", "bench"
PROGRAM = """
import os, random, time
m = bytearray(os.urandom(1 << 20) * {mib})
done, began, r = 0, time.monotonic(), random.Random(7)
f = open('/count', 'a', 1)
while True:
    due = min(int((time.monotonic() - began) * {rate}) - done, {rate} // 5)
    for _ in range(due): m[r.randrange({mib} << 8) << 12] = done & 255
    done += due
    f.write('%.4f\\n' % time.time())
    time.sleep(0.01)
"""
THERE = "ssh -o BatchMode=yes node2"
SHIP = "tar -C /run -cf - ck/$i | ssh -o BatchMode=yes node2 'mkdir -p /run/ck && tar -C /run -xf -'"
LAST = """
rsync -aHAXS --numeric-ids --delete BUNDLE/ node2:BUNDLE/
SHIP
THERE "cd BUNDLE && RUNTIME restore -d --image-path /run/ck/$i NAME </dev/null >/dev/null 2>&1"
rm -rf BUNDLE
"""


def last(runtime: str) -> str:
    """Return the end of a script, from the images of the last dump on."""
    words = {"BUNDLE": BUNDLE, "SHIP": SHIP, "THERE": THERE, "RUNTIME": runtime, "NAME": NAME}
    text = LAST
    for word, value in words.items():
        text = text.replace(word, value)
    return text


BEGIN = f"set -e; rm -rf /run/ck; mkdir -p /run/ck; {THERE} 'rm -rf /run/ck; mkdir -p {BUNDLE}'; rsync -aHAXS --numeric-ids {BUNDLE}/ node2:{BUNDLE}/"
SCRIPT = f"{BEGIN}; i=last; runc checkpoint --image-path /run/ck/last {NAME}{last('runc')}"
LOOP = f"""{BEGIN}
i=0 before= parent=
while :; do
    runtime checkpoint --pre-dump --image-path /run/ck/$i $parent {NAME}
    written=$(( $(cat /run/ck/$i/pages-*.img | wc -c) / 4096 ))
    {SHIP}
    parent="--parent-path ../$i"
    [ $i -lt 7 ] && [ $written -ge 64 ] && [ -z "$before" -o $written -le $(( ${{before:-0}} * 11 / 10 )) ] || break
    before=$written i=$((i + 1))
done
echo "$((i + 1)) pre-dumps" >&2
i=last
runtime checkpoint $parent --image-path /run/ck/last {NAME}
{last("runtime")}"""


def offset_s(vms: Vms) -> float:
    """Return how far node2's clock is ahead of node1's."""
    found = []
    for _ in range(5):
        told = vms.shell("node1", "date +%s.%N; ssh -o BatchMode=yes node2 date +%s.%N; date +%s.%N").split()
        before, there, after = map(float, told)
        found.append((after - before, there - (before + after) / 2))
    return min(found)[1]


def measure(vms: Vms, tool: str, mib: int, rate: int) -> tuple[float, float]:
    """Move once; return downtime and total time, in seconds."""
    vms.clean()
    for node in NODES:
        vms.shell(node, f"runc delete -f {NAME} 2>/dev/null || true; rm -rf /run/ck")
    with tempfile.TemporaryDirectory() as directory:
        made = BundleMaker(Path(directory))("/usr/bin/python3", "-c", PROGRAM.format(mib=mib, rate=rate), change=memory.system)
        vms.put(made, "node1", BUNDLE)
    if tool != "script":
        vms.detached("node1", "run", "--detach", "--bundle", BUNDLE, NAME)
    else:
        vms.shell("node1", f"cd {BUNDLE} && runc run -d {NAME} </dev/null >/dev/null 2>&1")
    vms.shell("node1", f"for i in $(seq 600); do [ -s {BUNDLE}/rootfs/count ] && break; sleep 0.1; done; sleep 3")
    ahead = offset_s(vms)
    started = time.monotonic()
    if tool == "ferry":
        vms.ok("node1", "migrate", "move", "--pre-copy", "always", "--progress", "none", NAME, "node2")
    else:
        done = vms.run("node1", "bash", "-c", LOOP if tool == "loop" else SCRIPT)
        print("#", done.stderr.strip(), file=sys.stderr)
        assert done.returncode == 0, f"{tool} failed"
    total = time.monotonic() - started
    time.sleep(5)
    stamps = [float(line) for line in vms.ok("node2", "cat", f"{BUNDLE}/rootfs/count").split()[:-1]]
    pauses = [(b - a, a) for a, b in pairwise(stamps)]
    # Only at the longest one the clock became another.
    return max(pauses)[0] - ahead, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=int, default=12, help="the guests' /run, where the images lie, is small")
    parser.add_argument("--rates", default="100,1000")
    arguments = parser.parse_args()
    vms = Vms("bench")
    rows = [("pages a second", "tool", "downtime", "times ours", "total")]
    try:
        vms.up()
        for rate in map(int, arguments.rates.split(",")):
            found: dict[str, list[tuple[float, float]]] = {}
            for _ in range(arguments.rounds):
                for tool in ("ferry", "loop", "script"):
                    found.setdefault(tool, []).append(measure(vms, tool, arguments.mib, rate))
                    print(f"# {rate}, {tool}: {found[tool][-1][0]:.1f} s", file=sys.stderr, flush=True)
            ours = statistics.median(d for d, _ in found["ferry"])
            for tool, seen in found.items():
                down, total = (statistics.median(s[k] for s in seen) for k in (0, 1))
                rows.append(
                    (str(rate), tool, f"{down:.1f} s", "-" if tool == "ferry" else f"{down / ours:.1f}", f"{total:.0f} s")
                )
    finally:
        vms.down()
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
