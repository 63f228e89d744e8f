"""Servers that move under load, their clients connected, over a link of 1 Gbit/s: `make bench-served`.

Each server has a network of its own on the hosts' bridge, and is moved by

* `migrate move --pre-copy auto`; as the tool `lazy` with `--on-diverge lazy`;
* the script of today with runc: files beforehand, checkpoint on a tmpfs, what changed, the images over ssh, restore;
* podman: `checkpoint --export`, the archive over ssh, `restore --import`.

The scripts are given their best: the image or the files are on the target before, the network is made there silently before the
freeze, and announced when the container runs, so that their clients stay connected, too. All use the same CRIU.

Told by what is outside of the tools: the downtime is the longest time between two answers that a client saw, who asks all the time and
checks that no answer is lost or repeated; the bytes are those that the switch carried to the target; the container's pace is that of a
client who writes as fast as he is answered (rate `max`), or as fast as he was told. The floor is CRIU's dump and its restore of the same
server on one host, without copying anything, plus the line's time for what `migrate` had to send in the freeze.

    served.py [--rounds N] [--tools ferry,lazy,runc,podman,floor] [--loads redis:64:1000,postgres:10:100] [--json FILE] [--plot FILE]

servers.py says what loads there are.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.plot import draw  # noqa: E402
from tests.bench.servers import Load  # noqa: E402
from tests.helpers import bridged  # noqa: E402
from tests.helpers.bed import BUNDLES, Bed  # noqa: E402
from tests.helpers.bundle import BundleMaker  # noqa: E402
from tests.helpers.oci import CRIU, OURS  # noqa: E402

NAME, RATE, RATE_BYTES = "served", "1gbit", 125e6
BUNDLE = f"{BUNDLES}/{NAME}"
IMAGE = "localhost/bench"
_MOVE_S = 900
HOSTS = ("host1", "host2")
MOVES: dict[str, tuple[str, ...]] = {"ferry": (), "lazy": ("--on-diverge", "lazy")}
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


class Served:
    """A server in a container on host1, filled, and its clients."""

    def __init__(self, bed: Bed, tool: str, load: Load) -> None:
        self._bed, self._tool, self._load = bed, tool, load
        self._clients: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        """Start all of it; `end` is to be called also when this fails."""
        bed, tool, load = self._bed, self._tool, self._load
        bridged.attach(bed, "host1")
        if tool == "podman":
            self._start_podman()
        else:
            path = bed.path("host1", BUNDLE)
            path.parent.mkdir(parents=True, exist_ok=True)
            BundleMaker(path.parent)(*self._argv(), path=path, change=self._change)
            load.server.make(path / "rootfs", load.size)
            runtime = "runc" if tool == "runc" else "runtime"
            bed.ok("host1", "sh", "-c", f"cd {BUNDLE} && {runtime} run -d {NAME} </dev/null >/dev/null 2>&1")
        deadline = time.monotonic() + 60
        while "LISTEN" not in bed.ok("host1", "ip", "netns", "exec", bridged.NET, "ss", "-lnt"):
            assert time.monotonic() < deadline, f"{load.name} does not listen"
            time.sleep(0.1)
        subprocess.run(self._client("fill"), check=True, stdin=subprocess.DEVNULL)
        for what in ("probe", "load"):
            client = subprocess.Popen(self._client(what), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert client.stdout and client.stdout.readline() == "connected\n"
            self._clients[what] = client

    def _argv(self) -> Sequence[str]:
        return self._load.server.argv(self._load.size, self._load.rate)

    def _change(self, config: dict[str, Any]) -> None:
        next(n for n in config["linux"]["namespaces"] if n["type"] == "network")["path"] = f"/run/netns/{bridged.NET}"
        config["process"]["user"] = {"uid": self._load.server.user, "gid": self._load.server.user}

    def _start_podman(self) -> None:
        rootfs = self._bed.path("host1", "/var/lib/image")
        BundleMaker(rootfs.parent)(path=rootfs)
        self._load.server.make(rootfs / "rootfs", self._load.size)
        make = f"tar -C /var/lib/image/rootfs -c . | {PODMAN} import - {IMAGE} && {PODMAN} save {IMAGE} | ssh host2 {PODMAN} load"
        self._bed.ok("host1", "bash", "-ec", f"set -o pipefail; {{ {make}; }} >/dev/null 2>&1")
        user = self._load.server.user
        options = f"--network ns:/run/netns/{bridged.NET} --no-hosts --security-opt seccomp=unconfined --log-driver none --user {user}:{user}"
        words = " ".join(shlex.quote(w) for w in self._argv())
        self._bed.ok("host1", "sh", "-c", f"{PODMAN} run -d --name {NAME} {options} {IMAGE} {words} </dev/null")

    def _client(self, what: str) -> list[str]:
        load = self._load
        inside = ["nsenter", f"--net=/run/netns/ferry-{self._bed.name}-client", sys.executable]
        return [*inside, str(ROOT / "tests/bench" / load.server.client), what, bridged.ADDRESS, str(load.size), str(load.rate)]

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


def has_sys_resource() -> bool:
    status = Path("/proc/self/status").read_text()
    return bool(int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16) >> 24 & 1)


def sent_in_freeze(report: dict[str, Any]) -> int:
    """Return how many bytes had to travel while the container stood still."""
    details = report["details"]
    return int(sum(details["freeze"][what]["content_bytes"] for what in ("delta", "pages")) + details["ship"]["content_bytes"])


def measure(bed: Bed, tool: str, load: Load) -> dict[str, Any]:
    """Move once; return what was seen of it."""
    served = Served(bed, tool, load)
    try:
        served.start()
        if tool == "floor":
            time.sleep(3)
            script = ROOT / "tests/bench/floor.py"
            criu = bed.ok("host1", str(Path(OURS).with_name("python")), str(script), BUNDLE, NAME, "--tcp-established")
            served.seen()
            return {"tool": tool, "load": str(load), "downtime_ms": float(criu)}
        if tool not in MOVES:
            bridged.prepare(bed, "host2")
            bed.ok("host2", "mkdir", "-p", BUNDLE)
        time.sleep(3)
        before, started = carried(bed), time.time()
        found: dict[str, Any] = {"tool": tool, "load": str(load)}
        with peak_memory(bed) as peak:
            if tool in MOVES:
                found["report"] = bed.move("host1", NAME, "host2", *MOVES[tool], timeout_s=_MOVE_S)
            else:
                script = RUNC if tool == "runc" else PODMAN_MOVE
                done = bed.run("host1", "bash", "-c", script, timeout_s=_MOVE_S)
                assert done.returncode == 0, done.stderr
        ended = time.time()
        time.sleep(1)
        seen = served.seen()
        pauses = [(b - a, a) for a, b in pairwise(seen["probe"]) if b > started]
        pause, began = max(pauses)
        return {
            **found,
            "downtime_ms": pause * 1000,
            "pauses": [(round(at - started, 3), round(ms, 3)) for ms, at in sorted(pauses)[-5:]],
            "total_s": ended - started,
            "wire_bytes": carried(bed) - before,
            "peak_bytes": dict(peak),
            "pace_before": pace(seen["load"], started - 2.5, started),
            "pace_meanwhile": pace(seen["load"], started, began),
        }
    finally:
        served.end()


def told(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table: one row for each load and tool, medians."""
    head = ("load", "tool", "downtime", "times ours", "floor", "total", "on the wire", "our memory", "pace meanwhile")
    rows: list[tuple[str, ...]] = [head]
    for load, tool in dict.fromkeys((f["load"], f["tool"]) for f in found if f["tool"] != "floor"):
        these = [f for f in found if (f["load"], f["tool"]) == (load, tool)]
        ours = [f for f in found if (f["load"], f["tool"]) == (load, "ferry")]
        bare = [f["downtime_ms"] for f in found if (f["load"], f["tool"]) == (load, "floor")]

        def med(key: Any, these: list[dict[str, Any]] = these) -> float:
            return statistics.median(key(f) for f in these)

        def down(f: dict[str, Any]) -> float:
            return float(f["downtime_ms"])

        paces = [f["pace_meanwhile"] / f["pace_before"] for f in these if f["pace_before"] and f["pace_meanwhile"]]
        is_ours = tool in MOVES
        rows.append(
            (
                load,
                tool,
                f"{med(down):.0f} ms",
                f"{med(down) / med(down, ours):.1f}" if ours and tool != "ferry" else "-",
                f"{statistics.median(bare) + med(lambda f: sent_in_freeze(f['report'])) / RATE_BYTES * 1000:.0f} ms"
                if is_ours and bare
                else "-",
                f"{med(lambda f: f['total_s']):.1f} s",
                f"{med(lambda f: f['wire_bytes']) / (1 << 20):.0f} MiB",
                f"{med(lambda f: max(f['peak_bytes'].values())) / (1 << 20):.0f} MiB" if is_ours else "-",
                f"{100 * statistics.median(paces):.0f} %" if paces else "-",
            )
        )
    return rows


LOADS = "redis:64:1000,redis:512:1000,redis:1024:0,redis:1024:1000,redis:1024:5000,postgres:10:100,nginx:64:100,files:100000:10"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", default="ferry,runc,podman,floor")
    parser.add_argument("--loads", default=LOADS)
    parser.add_argument("--json", type=Path, help="write all that was measured")
    parser.add_argument("--plot", type=Path, help="draw the downtimes (SVG)")
    arguments = parser.parse_args()
    bed = Bed("served")
    bed.up()
    found: list[dict[str, Any]] = []
    try:
        bed.shape(RATE)
        for load in map(Load.read, arguments.loads.split(",")):
            if load.server.user and not has_sys_resource():
                print(
                    f"# {load}: left out, since CRIU cannot read the limits of another user here: no CAP_SYS_RESOURCE",
                    file=sys.stderr,
                )
                continue
            for _ in range(arguments.rounds):
                for tool in arguments.tools.split(","):
                    found.append(measure(bed, tool, load))
                    last = found[-1]
                    print(f"# {load}, {tool}: {last['downtime_ms']:.0f} ms", file=sys.stderr, flush=True)
    finally:
        bed.down()
        if arguments.json:
            arguments.json.write_text(json.dumps(found))
    if arguments.plot:
        draw(found, arguments.plot)
    rows = told(found)
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))))


if __name__ == "__main__":
    main()
