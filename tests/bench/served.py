"""Servers that move under load, their clients connected, over a link of 1 Gbit/s: `make bench-served`.

Each server has a network of its own on the hosts' bridge, and is moved by

* `migrate move --pre-copy auto`;
* the script of today with runc: files beforehand, checkpoint on a tmpfs, what changed, the images over ssh, restore;
* podman: `checkpoint --export`, the archive over ssh, `restore --import`.

The scripts are given their best: the image or the files are on the target before, the network is made there silently before the
freeze, and announced when the container runs, so that their clients stay connected, too. All use the same CRIU.

Told by what is outside of the tools: the downtime is the longest time between two answers that a client saw, who asks all the time and
checks that no answer is lost or repeated; the bytes are those that the switch carried to the target; the container's pace is that of a
client who writes as fast as he is answered (rate `max`), or as fast as he was told.

    served.py [--rounds N] [--tools ferry,runc,podman] [--loads 64:1000,512:1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.helpers import bridged  # noqa: E402
from tests.helpers.bed import BUNDLES, Bed  # noqa: E402
from tests.helpers.bundle import BundleMaker  # noqa: E402
from tests.helpers.oci import CRIU  # noqa: E402

NAME, RATE = "redis", "1gbit"
BUNDLE = f"{BUNDLES}/{NAME}"
IMAGE = "localhost/bench"
SERVER = (
    "redis-server",
    "--bind",
    bridged.ADDRESS,
    "--save",
    "",
    "--appendonly",
    "no",
    "--protected-mode",
    "no",
    "--dir",
    "/tmp",
)
_MOVE_S = 900
HOSTS = ("host1", "host2")
# The container's network on the target is made before, and heard of only when the container runs.
ANNOUNCE = f"ip link set web0 up; ip netns exec {bridged.NET} busybox arping -U -q -c 1 -I eth0 {bridged.ADDRESS} || true"
RUNC = f"""set -e
rsync -aHAXS --numeric-ids {BUNDLE}/ host2:{BUNDLE}/
runc --criu {CRIU} checkpoint --tcp-established --image-path /run/ckpt {NAME}
ip netns del {bridged.NET}
rsync -aHAXS --numeric-ids --delete {BUNDLE}/ host2:{BUNDLE}/
tar -C /run -cf - ckpt | ssh -c aes128-gcm@openssh.com host2 'tar -C /run -xf -'
ssh host2 'cd {BUNDLE} && runc --criu {CRIU} restore -d --tcp-established --image-path /run/ckpt {NAME} </dev/null >/dev/null 2>&1 && {{ {ANNOUNCE}; }}'
rm -rf /run/ckpt {BUNDLE}
ssh host2 rm -rf /run/ckpt
"""
PODMAN = "podman --cgroup-manager=cgroupfs --events-backend=none --runtime=/usr/sbin/runc"
PODMAN_MOVE = f"""set -e
PATH={Path(CRIU).parent}:$PATH
{PODMAN} container checkpoint --tcp-established --compress none --export /run/ckpt.tar {NAME} >/dev/null
ip netns del {bridged.NET}
ssh -c aes128-gcm@openssh.com host2 'cat >/run/ckpt.tar' </run/ckpt.tar
ssh host2 'PATH={Path(CRIU).parent}:$PATH; {PODMAN} container restore --tcp-established --import /run/ckpt.tar && {{ {ANNOUNCE}; }}' >/dev/null
rm -f /run/ckpt.tar
ssh host2 rm -f /run/ckpt.tar
"""


class Redis:
    """A Redis in a container on host1, filled, and the clients of it."""

    def __init__(self, bed: Bed, tool: str, mib: int, rate: int) -> None:
        self._bed, self._tool = bed, tool
        self._clients: dict[str, subprocess.Popen[str]] = {}
        bridged.attach(bed, "host1")
        if tool == "podman":
            self._start_podman()
        else:
            path = bed.path("host1", BUNDLE)
            path.parent.mkdir(parents=True, exist_ok=True)
            BundleMaker(path.parent)(*SERVER, path=path, change=_joined)
            install("redis-server", path / "rootfs")
            runtime = {"ferry": "runtime", "runc": "runc"}[tool]
            bed.ok("host1", "sh", "-c", f"cd {BUNDLE} && {runtime} run -d {NAME} </dev/null >/dev/null 2>&1")
        deadline = time.monotonic() + 60
        while "LISTEN" not in bed.ok("host1", "ip", "netns", "exec", bridged.NET, "ss", "-lnt"):
            assert time.monotonic() < deadline, "Redis does not listen"
            time.sleep(0.1)
        subprocess.run(self._argv("fill", str(mib)), check=True, stdin=subprocess.DEVNULL)
        for what, options in (("probe", ()), ("load", (str(rate), str(mib)))):
            client = subprocess.Popen(self._argv(what, *options), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert client.stdout and client.stdout.readline() == "connected\n"
            self._clients[what] = client

    def _start_podman(self) -> None:
        rootfs = self._bed.path("host1", "/var/lib/image")
        BundleMaker(rootfs.parent)(path=rootfs)
        install("redis-server", rootfs / "rootfs")
        make = f"tar -C /var/lib/image/rootfs -c . | {PODMAN} import - {IMAGE} && {PODMAN} save {IMAGE} | ssh host2 {PODMAN} load"
        self._bed.ok("host1", "bash", "-ec", f"set -o pipefail; {{ {make}; }} >/dev/null 2>&1")
        options = f"--network ns:/run/netns/{bridged.NET} --no-hosts --security-opt seccomp=unconfined --log-driver none"
        words = " ".join(f"'{w}'" for w in SERVER)
        self._bed.ok("host1", "sh", "-c", f"{PODMAN} run -d --name {NAME} {options} {IMAGE} {words} </dev/null")

    def _argv(self, *args: str) -> list[str]:
        what, *rest = args
        inside = ["nsenter", f"--net=/run/netns/ferry-{self._bed.name}-client", sys.executable]
        return [*inside, str(ROOT / "tests/bench/redis_client.py"), what, bridged.ADDRESS, *rest]

    def seen(self) -> dict[str, Any]:
        """End the clients; return what they saw. Raises: AssertionError when a connection broke, or an answer was not right."""
        told = {}
        for what, client in self._clients.items():
            out, _ = client.communicate("end\n", timeout=700)
            assert client.returncode == 0, f"{self._tool}: {what} ended"
            told[what] = json.loads(out)["seen"]
        return told

    def end(self) -> None:
        for client in self._clients.values():
            client.kill()
            client.wait()
        for host in HOSTS:
            if self._tool == "podman":
                self._bed.run(host, "sh", "-c", f"{PODMAN} rm -f -t 0 {NAME}; {PODMAN} rmi -f {IMAGE}")
            self._bed.run(host, "runc", "delete", "-f", NAME)
        self._bed.clean()
        for host in HOSTS:
            bridged.detach(self._bed, host)
            self._bed.run(host, "sh", "-c", f"rm -rf /run/ckpt /run/ckpt.tar /var/lib/image {BUNDLE}")


def install(program: str, rootfs: Path) -> None:
    """Copy one of this machine's programs, and the libraries that it is linked to, to where it would be in a root of its own."""
    found = shutil.which(program)
    assert found, f"{program} is not installed: scripts/install-packages --tests"
    told = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
    for name in [found, *re.findall(r"(/\S+) \(0x", told)]:
        copy = rootfs / name[1:]
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, copy)


def _joined(config: dict[str, Any]) -> None:
    next(n for n in config["linux"]["namespaces"] if n["type"] == "network")["path"] = f"/run/netns/{bridged.NET}"


@contextmanager
def peak_memory(bed: Bed) -> Iterator[dict[str, int]]:
    """Watch what our processes on either host take at most, all of a host together, in bytes."""
    peak, over = dict.fromkeys(HOSTS, 0), threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for host in HOSTS:
                pids = {p for kind in ("agent", "runtime", "criu") for p in bed.processes(host, kind)}
                peak[host] = max(peak[host], sum(_resident(p) for p in pids))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _resident(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) << 10


def carried(bed: Bed) -> int:
    """Return how many bytes the switch sent to the target so far."""
    argv = ["ip", "-n", f"ferry-{bed.name}-switch", "-j", "-s", "link", "show", "p-host2"]
    return int(json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)[0]["stats64"]["tx"]["bytes"])


def pace(load: list[tuple[float, int]], since: float, until: float) -> float:
    """Return writes a second between two times."""
    within = [(t, n) for t, n in load if since <= t <= until]
    return (within[-1][1] - within[0][1]) / (within[-1][0] - within[0][0]) if len(within) > 1 else 0.0


def measure(bed: Bed, tool: str, mib: int, rate: int) -> dict[str, Any]:
    """Move once; return what was seen of it."""
    redis = Redis(bed, tool, mib, rate)
    try:
        if tool != "ferry":
            bridged.prepare(bed, "host2")
            bed.ok("host2", "mkdir", "-p", BUNDLE)
        time.sleep(3)
        before, started = carried(bed), time.time()
        found: dict[str, Any] = {"tool": tool, "mib": mib, "rate": rate}
        with peak_memory(bed) as peak:
            if tool == "ferry":
                found["report"] = bed.move("host1", NAME, "host2", "--pre-copy", "auto", timeout_s=_MOVE_S)
            else:
                script = RUNC if tool == "runc" else PODMAN_MOVE
                done = bed.run("host1", "bash", "-c", script, timeout_s=_MOVE_S)
                assert done.returncode == 0, done.stderr
        ended = time.time()
        time.sleep(1)
        seen = redis.seen()
        pauses = [(b - a, a) for a, b in pairwise(seen["probe"]) if b > started]
        pause, began = max(pauses)
        return {
            **found,
            "downtime_ms": pause * 1000,
            "total_s": ended - started,
            "wire_bytes": carried(bed) - before,
            "peak_bytes": dict(peak),
            "pace_before": pace(seen["load"], started - 2.5, started),
            "pace_meanwhile": pace(seen["load"], started, began),
        }
    finally:
        redis.end()


def told(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table: one row for each load and tool, medians."""
    head = ("memory", "writes/s", "tool", "downtime", "total", "on the wire", "our memory", "pace meanwhile", "downtime ratio")
    rows: list[tuple[str, ...]] = [head]
    kinds = list(dict.fromkeys((f["mib"], f["rate"], f["tool"]) for f in found))
    for mib, rate, tool in kinds:
        these = [f for f in found if (f["mib"], f["rate"], f["tool"]) == (mib, rate, tool)]
        ours = [f for f in found if (f["mib"], f["rate"], f["tool"]) == (mib, rate, "ferry")]

        def med(key: Any, these: list[dict[str, Any]] = these) -> float:
            return statistics.median(key(f) for f in these)

        def down(f: dict[str, Any]) -> float:
            return float(f["downtime_ms"])

        paces = [f["pace_meanwhile"] / f["pace_before"] for f in these if f["pace_before"] and f["pace_meanwhile"]]
        rows.append(
            (
                f"{mib} MiB",
                str(rate) if rate else "max",
                tool,
                f"{med(down):.0f} ms",
                f"{med(lambda f: f['total_s']):.1f} s",
                f"{med(lambda f: f['wire_bytes']) / (1 << 20):.0f} MiB",
                f"{med(lambda f: max(f['peak_bytes'].values())) / (1 << 20):.0f} MiB" if tool == "ferry" else "-",
                f"{100 * statistics.median(paces):.0f} %" if paces else "-",
                f"{med(down) / med(down, ours):.1f}" if ours else "-",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", default="ferry,runc,podman")
    parser.add_argument(
        "--loads", default="64:1000,512:1000,1024:0,1024:1000,1024:5000", help="MiB:writes a second (0: as many as can be)"
    )
    parser.add_argument("--json", type=Path, help="write all that was measured")
    arguments = parser.parse_args()
    bed = Bed("served")
    bed.up()
    found: list[dict[str, Any]] = []
    try:
        bed.shape(RATE)
        for load in arguments.loads.split(","):
            mib, rate = map(int, load.split(":"))
            for _ in range(arguments.rounds):
                for tool in arguments.tools.split(","):
                    found.append(measure(bed, tool, mib, rate))
                    last = found[-1]
                    print(
                        f"# {mib} MiB, {rate}/s, {tool}: {last['downtime_ms']:.0f} ms, {last['total_s']:.1f} s", file=sys.stderr
                    )
    finally:
        bed.down()
        if arguments.json:
            arguments.json.write_text(json.dumps(found))
    rows = told(found)
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
