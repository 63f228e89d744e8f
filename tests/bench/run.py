"""Ferry against what people use today, on the same bed, in the same run: `make bench`.

* Downtime and total time of `migrate move` against a script: `runc checkpoint`, tar over ssh, `runc restore`. The
  script is given its best: the rootfs is on the target before it starts, and the images lie on tmpfs on both sides.
  Downtime is what the container itself sees: the longest pause between two of its own time stamps.
* The floor: CRIU's own dump and restore of the same container on one host, without any copying.
* The verbs that tools call often, and a hundred containers run and deleted, against runc.
* A large file: the rate of the copy while the container runs, against `cat` over `ssh`.

Runs of the two sides alternate; medians and ratios are printed. `--rounds N` sets how many (default 5).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.helpers.bed import BUNDLES, Bed  # noqa: E402
from tests.helpers.bundle import BundleMaker  # noqa: E402
from tests.helpers.oci import CRIU, OURS  # noqa: E402

NAME = "bench"
BUNDLE = f"{BUNDLES}/{NAME}"
SCRIPT = f"""set -e
rsync -aHAXS --numeric-ids {BUNDLE}/ $TARGET:{BUNDLE}/
runc --criu {CRIU} checkpoint --image-path /run/ckpt {NAME}
rsync -aHAXS --numeric-ids --delete {BUNDLE}/ $TARGET:{BUNDLE}/
tar -C /run -cf - ckpt | ssh $TARGET 'tar -C /run -xf -'
ssh $TARGET 'cd {BUNDLE} && runc --criu {CRIU} restore -d --image-path /run/ckpt {NAME} </dev/null >/dev/null 2>&1'
runc delete -f {NAME}
rm -rf /run/ckpt {BUNDLE}
ssh $TARGET rm -rf /run/ckpt
"""
# The clock is that of the day: CRIU gives a restored container monotonic clocks that stood still meanwhile.
STAMPS = 'i=0; while :; do i=$((i+1)); echo "$i $EPOCHREALTIME" >>/count; usleep 2000; done'
MEMORY = (
    "import os, time; m = [os.urandom(1 << 20) for _ in range({mib})]; n = 0; f = open('/count', 'a', 1)\n"
    "while True: n += 1; f.write('%d %.4f\\n' % (n, time.time())); time.sleep(0.005)"
)


def _system(config: dict[str, Any]) -> None:
    for directory in ("/usr", "/lib", "/lib64"):
        real = str(Path(directory).resolve())
        if Path(directory).exists():
            config["mounts"].append({"destination": directory, "type": "bind", "source": real, "options": ["rbind", "ro"]})


def make(bed: Bed, mib: int) -> Path:
    path = bed.path("host1", BUNDLE)
    if mib == 0:
        return BundleMaker(path.parent)("sh", "-c", STAMPS, path=path)
    bundle = BundleMaker(path.parent)("/usr/bin/python3", "-c", MEMORY.format(mib=mib), path=path, change=_system)
    for directory in ("usr", "lib", "lib64"):
        (bundle / "rootfs" / directory).mkdir()
    return bundle


def pause_ms(count: Path, since: int) -> float:
    """Return the longest pause after number `since`, as the container saw it; fail on a gap or a repetition."""
    rows = [line.split() for line in count.read_text().splitlines() if len(line.split()) == 2]
    assert [int(n) for n, _ in rows] == list(range(1, len(rows) + 1)), "gap or repetition"
    times = [float(t) for _, t in rows[since - 1 :]]
    return max((b - a) * 1000 for a, b in pairwise(times))


def measure(bed: Bed, mib: int, tool: str) -> tuple[float, float, float | None]:
    """Move once from host1 to host2; return (downtime by the container, total, downtime by the report) in ms."""
    bed.clean()
    for host in ("host1", "host2"):
        bed.run(host, "runc", "delete", "-f", NAME)
        bed.run(host, "rm", "-rf", "/run/ckpt", BUNDLE)
    bundle = make(bed, mib)
    runtime = "runtime" if tool == "ferry" else "runc"
    bed.ok("host1", "sh", "-c", f"cd {BUNDLE} && {runtime} run -d {NAME} </dev/null >/dev/null 2>&1")
    count = bundle / "rootfs/count"
    deadline = time.monotonic() + 60
    while not count.exists() or len(count.read_text().splitlines()) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    since = len(count.read_text().splitlines())
    reported = None
    started = time.monotonic()
    if tool == "ferry":
        reported = json.loads(bed.ok("host1", "migrate", "move", "--json", NAME, "host2"))["downtime_ms"]
    else:
        if bed.path("host2", BUNDLES).exists() is False:
            bed.ok("host2", "mkdir", "-p", BUNDLES)
        bed.ok("host1", "env", "TARGET=host2", "bash", "-c", SCRIPT)
    total = (time.monotonic() - started) * 1000
    time.sleep(0.4)
    downtime = pause_ms(bed.path("host2", f"{BUNDLE}/rootfs/count"), since)
    bed.ok("host2", runtime, "delete", "-f", NAME)
    return downtime, total, reported


def floor(bed: Bed, mib: int) -> float:
    """Return the time of CRIU's dump and restore alone, in ms: frozen to dumped, and request to restored."""
    bed.clean()
    make(bed, mib)
    script = ROOT / "tests/bench/floor.py"
    python = str(Path(OURS).with_name("python"))
    bed.start("host1", BUNDLE, NAME)
    time.sleep(1.5)
    try:
        return float(bed.ok("host1", python, str(script), BUNDLE, NAME))
    finally:
        bed.ok("host1", "runtime", "delete", "-f", NAME)


def med(values: list[float]) -> float:
    return statistics.median(values)


def table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))))
    print()


def moves(bed: Bed, rounds: int) -> None:
    rows: list[tuple[str, ...]] = [
        ("container", "downtime: ferry", "script", "ferry/script", "floor", "total: ferry", "script", "downtime by the report")
    ]
    for label, mib in (("BusyBox", 0), ("256 MiB", 256)):
        found: dict[str, list[tuple[float, float, float | None]]] = {"ferry": [], "script": []}
        floors = []
        for _ in range(rounds):
            for tool in ("ferry", "script"):
                found[tool].append(measure(bed, mib, tool))
            floors.append(floor(bed, mib))
        down = {t: [d for d, _, _ in found[t]] for t in found}
        ratio = med([f / s for f, s in zip(down["ferry"], down["script"], strict=True)])
        totals = {t: med([x for _, x, _ in found[t]]) for t in found}
        reported = med([r for _, _, r in found["ferry"] if r is not None])
        rows.append(
            (label, f"{med(down['ferry']):.0f} ms", f"{med(down['script']):.0f} ms", f"{ratio:.2f}", f"{med(floors):.0f} ms",
             f"{totals['ferry']:.0f} ms", f"{totals['script']:.0f} ms", f"{reported:.0f} ms")
        )  # fmt: skip
    print(f"Moves, medians of {rounds} rounds; downtime is the longest pause that the container saw")
    table(rows)


VERBS = {
    "run true": "{tool} run t",
    "create, start, delete": "{tool} create t </dev/null >/dev/null 2>&1; {tool} start t; {tool} delete -f t",
    "exec true": "{tool} exec up true",
    "state": "{tool} state up >/dev/null",
}


def starts(bed: Bed, rounds: int) -> None:
    """Time the verbs that tools call often; each pair of runs follows the other at once."""
    bed.clean()
    path = bed.path("host1", BUNDLE)
    BundleMaker(path.parent)("true", path=path)
    sleeper = f"{BUNDLES}/sleeper"
    BundleMaker(path.parent)("sleep", "1000", path=bed.path("host1", sleeper))
    rows: list[tuple[str, ...]] = [("verb", "runtime", "runc", "ratio")]
    for tool in ("runtime", "runc"):
        bed.ok("host1", "sh", "-c", f"cd {sleeper} && {tool} run -d up </dev/null >/dev/null 2>&1")
        try:
            rows.append((f"processes of {tool} beside a running container", str(_own_processes(bed, tool)), "", ""))
        finally:
            bed.ok("host1", tool, "delete", "-f", "up")
    left = rows[1:]
    rows = rows[:1]
    for name, line in VERBS.items():
        found: dict[str, list[float]] = {"runtime": [], "runc": []}
        for _ in range(rounds * 4):
            for tool in found:
                around = line.replace("{tool}", tool)
                if "up" in line.split():
                    bed.ok("host1", "sh", "-c", f"cd {sleeper} && {tool} run -d up </dev/null >/dev/null 2>&1")
                out = bed.ok("host1", "bash", "-c", f"cd {BUNDLE}; s=$EPOCHREALTIME; {around}; echo $s $EPOCHREALTIME")
                if "up" in line.split():
                    bed.ok("host1", tool, "delete", "-f", "up")
                begin, end = (float(x) for x in out.split()[-2:])
                found[tool].append((end - begin) * 1000)
        ratio = med([a / b for a, b in zip(found["runtime"], found["runc"], strict=True)])
        rows.append((name, f"{med(found['runtime']):.0f} ms", f"{med(found['runc']):.0f} ms", f"{ratio:.2f}"))
    print(f"Verbs, medians of {rounds * 4} rounds")
    table(rows)
    table([(r[0], r[1]) for r in left])


def _own_processes(bed: Bed, tool: str) -> int:
    """Count the processes that stay of a runtime while its container runs."""
    out = bed.ok("host1", "sh", "-c", "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done 2>/dev/null")
    return sum(1 for line in out.splitlines() if f"{tool} run" in line and "sh -c" not in line)


def many(bed: Bed, rounds: int, count: int = 100, at_once: int = 8) -> None:
    """Create, start and delete many containers, several at once."""
    bed.clean()
    path = bed.path("host1", BUNDLE)
    BundleMaker(path.parent)("sleep", "1000", path=path)
    found: dict[str, list[float]] = {"runtime": [], "runc": []}
    for _ in range(rounds):
        for tool in found:
            one = f"{tool} run -d many$1 </dev/null >/dev/null 2>&1 && {tool} delete -f many$1"
            script = (
                f"cd {BUNDLE}; s=$EPOCHREALTIME; seq {count} | xargs -P {at_once} -I@ sh -c '{one}' sh @; echo $s $EPOCHREALTIME"
            )
            begin, end = (float(x) for x in bed.ok("host1", "bash", "-c", script).split()[-2:])
            found[tool].append(end - begin)
    ratio = med([a / b for a, b in zip(found["runtime"], found["runc"], strict=True)])
    print(f"{count} containers run and deleted, {at_once} at once, medians of {rounds} rounds")
    table([("runtime", "runc", "ratio"), (f"{med(found['runtime']):.1f} s", f"{med(found['runc']):.1f} s", f"{ratio:.2f}")])


def bulk(bed: Bed, rounds: int, mib: int = 512) -> None:
    rates: dict[str, list[float]] = {"ferry": [], "ssh": [], "ssh, AES-GCM": []}
    for _ in range(rounds):
        bed.clean()
        bundle = make(bed, 0)
        with (bundle / "rootfs/large").open("wb") as f:
            block = Path("/dev/urandom").open("rb").read(1 << 20)
            for _ in range(mib):
                f.write(block)
        bed.start("host1", BUNDLE, NAME)
        bed.ok("host1", "sync")  # or the first of the three pays for writing the file out
        report = json.loads(bed.ok("host1", "migrate", "move", "--json", NAME, "host2"))
        first = report["details"]["precopy"]["passes"][0]
        rates["ferry"].append(first["content_bytes"] / (1 << 20) / first["seconds"])
        for name, option in (("ssh", ""), ("ssh, AES-GCM", "-c aes128-gcm@openssh.com")):
            script = f"cd {BUNDLE}/rootfs; s=$EPOCHREALTIME; ssh {option} host1 'cat >/var/lib/large' <large; echo $s $EPOCHREALTIME; ssh host1 rm /var/lib/large"
            bed.ok("host1", "sync")
            begin, end = (float(x) for x in bed.ok("host2", "bash", "-c", script).split())
            rates[name].append(mib / (end - begin))
    print(f"A file of {mib} MiB, medians of {rounds} rounds (ssh's time has its login in it, ferry's connection is open before)")
    table([tuple(rates), tuple(f"{med(v):.0f} MiB/s" for v in rates.values())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("what", nargs="*", default=["moves", "starts", "many", "bulk"])
    arguments = parser.parse_args()
    bed = Bed("bench")
    bed.up()
    try:
        for what in arguments.what:
            {"moves": moves, "starts": starts, "many": many, "bulk": bulk}[what](bed, arguments.rounds)
    finally:
        bed.down()


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as e:
        sys.exit(f"{e.cmd}: status {e.returncode}")
