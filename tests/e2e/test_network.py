"""A container moves with its network: same addresses, same MAC, and clients that stay connected and count every byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from runtime.memory.tracker import supported
from tests.e2e.test_move import BUNDLE, NAME, start_python
from tests.helpers.bed import Bed
from tests.helpers.bridged import ADDRESS, ADDRESS6, CLIENT6, MAC, NET, attach, detach
from tests.helpers.oci import wait_for
from tests.helpers.stopped import Stopped

# Answers each connection with what it says, and counts, so that two of it would be seen.
SERVER = f"""
import socket, threading
def serve(s):
    while data := s.recv(65536): s.sendall(data)
def listen(family, address):
    l = socket.create_server((address, 7), family=family)
    while True: threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
threading.Thread(target=listen, args=(socket.AF_INET, '{ADDRESS}'), daemon=True).start()
open('/up', 'w')
listen(socket.AF_INET6, '{ADDRESS6}')
"""

# Sends numbers until it is told to stop, a window of them at a time; every byte of every answer is looked at.
CLIENT = """
import select, socket, sys, time
s = socket.create_connection((sys.argv[1], 7), timeout=20)
sent = seen = 0; buffer = b''; worst = 0.0; last = time.monotonic()
while not select.select([sys.stdin], [], [], 0)[0] or seen < sent:
    if sent - seen < 64 and not select.select([sys.stdin], [], [], 0)[0]:
        s.sendall(sent.to_bytes(8, 'big')); sent += 1
    if select.select([s], [], [], 0.005)[0]:
        data = s.recv(65536)
        assert data, 'the connection was closed'
        buffer += data
        while len(buffer) >= 8:
            assert int.from_bytes(buffer[:8], 'big') == seen, 'a byte is not right'
            seen += 1; buffer = buffer[8:]
            worst = max(worst, time.monotonic() - last); last = time.monotonic()
print(seen, round(worst, 3))
"""


class Client:
    """A client in the clients' network, connected until `stop`."""

    def __init__(self, bed: Bed, address: str) -> None:
        argv = ["nsenter", f"--net=/run/netns/ferry-{bed.name}-client", sys.executable, "-c", CLIENT, address]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def stop(self) -> tuple[int, float]:
        """Return how many answers there were, and the longest time in seconds between two."""
        out, err = self._process.communicate("stop\n", timeout=60)
        assert self._process.returncode == 0, err
        seen, worst = out.split()
        return int(seen), float(worst)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def seen_inside(bed: Bed, host: str) -> Any:
    """Return what a program in the network sees of it."""
    addresses = json.loads(bed.ok(host, "ip", "-j", "-n", NET, "addr"))
    for link in addresses:
        for key in ("ifindex", "link_index", "link_netnsid"):
            link.pop(key, None)
        link["addr_info"].sort(key=lambda a: a["local"])
        for a in link["addr_info"]:
            for passing in ("nodad", "tentative"):
                a.pop(passing, None)
    routes = [json.loads(bed.ok(host, "ip", "-j", "-n", NET, f, "route")) for f in ("-4", "-6")]
    neighbours = [(d["name"], d["dev"], d["retrans"], d["mcast_probes"]) for d in tables(bed, host) if "dev" in d]
    return addresses, [sorted(map(json.dumps, r)) for r in routes], sorted(neighbours)


def tables(bed: Bed, host: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(bed.ok(host, "ip", "-j", "-n", NET, "ntable"))
    return found


@pytest.fixture
def served(bed: Bed) -> Iterator[Bed]:
    """A bed with a server on host1 that has a network of its own."""
    client = [
        "nsenter",
        f"--net=/run/netns/ferry-{bed.name}-client",
        "ip",
        "addr",
        "replace",
        f"{CLIENT6}/64",
        "dev",
        "eth0",
        "nodad",
    ]
    subprocess.run(client, check=True)
    attach(bed, "host1")
    start_python(bed, SERVER, NET)
    wait_for((bed.path("host1", BUNDLE) / "rootfs/up").exists, "the server", 30)
    yield bed
    bed.clean()
    for host in ("host1", "host2"):
        detach(bed, host)


@pytest.fixture
def clients(served: Bed) -> Iterator[list[Client]]:
    wait_for(lambda: _connects(served), "an answer", 30)
    made = [Client(served, ADDRESS), Client(served, ADDRESS6)]
    yield made
    for client in made:
        client.kill()


def _connects(bed: Bed) -> bool:
    code = f"import socket\nfor a in ('{ADDRESS}', '{ADDRESS6}'): socket.create_connection((a, 7), timeout=2)"
    argv = ["nsenter", f"--net=/run/netns/ferry-{bed.name}-client", sys.executable, "-c", code]
    return subprocess.run(argv, stderr=subprocess.DEVNULL, check=False).returncode == 0


def namespaces(bed: Bed, host: str) -> list[str]:
    return bed.ok(host, "ls", "/run/netns").split()


@pytest.fixture
def datagrams(served: Bed) -> Iterator[None]:
    """Something is always on its way to it, as clients of TCP have not when what they sent before the freeze was acknowledged."""
    code = f"import socket, time\ns = socket.socket(type=socket.SOCK_DGRAM)\nwhile True: s.sendto(b'x', ('{ADDRESS}', 9)); time.sleep(0.002)"
    argv = ["nsenter", f"--net=/run/netns/ferry-{served.name}-client", sys.executable, "-c", code]
    process = subprocess.Popen(argv)
    yield
    process.kill()
    process.wait()


def test_clients_stay_connected(served: Bed, clients: list[Client], datagrams: None) -> None:
    bed = served
    before = seen_inside(bed, "host1")
    for here, there, how in (("host1", "host2", "never"), ("host2", "host1", "always")):
        report = bed.move(here, NAME, there, "--pre-copy", how if supported() else "never")
        assert "network" in {f["code"] for f in report["findings"]}
        assert namespaces(bed, here) == [] and namespaces(bed, there) == [NET]
        assert "web0" not in bed.ok(here, "ip", "link"), "the end of the cable is left"
        assert seen_inside(bed, there) == before
        assert report["details"]["commit"]["frames"] > 0, "nothing of what came meanwhile was handed on"
    seen = [client.stop()[0] for client in clients]
    assert min(seen) > 200


def test_a_move_that_is_undone_is_not_heard(served: Bed, clients: list[Client]) -> None:
    """The target's copy has the addresses all the while, and says nothing."""
    bed = served
    listening = _listen(bed)
    move = Stopped(bed, "host1", "restore.result:after", "migrate", "move", "--json", NAME, "host2")
    assert namespaces(bed, "host2") == [NET]
    move.signal(signal.SIGINT)
    status, _, _ = move.go_on()
    assert status == 4
    heard = listening.communicate(timeout=30)[0]
    assert bed.status("host1", NAME) == "running" and namespaces(bed, "host2") == []
    assert "web0" not in bed.ok("host2", "ip", "link")
    assert heard.strip() == "0", "host2 sent something in the name of the container"
    assert min(client.stop()[0] for client in clients) > 100


def test_a_question_that_nobody_hears_is_asked_again(served: Bed, clients: list[Client]) -> None:
    """A restored socket asks for its client's MAC while nothing is let out; the kernel's next question would be a second later."""
    bed = served
    move = Stopped(bed, "host1", "restore.result:after", "migrate", "move", "--json", NAME, "host2")
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('198.51.100.99', 9))"
    bed.ok("host2", "nsenter", f"--net=/run/netns/{NET}", sys.executable, "-c", send)

    def asked() -> int:
        told = bed.ok("host2", "ip", "-s", "-n", NET, "neigh", "show", "198.51.100.99")
        return int(told.split("probes ")[1].split()[0]) if "probes " in told else 0

    wait_for(lambda: asked() > 10, "more questions than the kernel asks by itself", 30)
    assert move.go_on()[0] == 0
    wait_for(lambda: len({d["retrans"] for d in tables(bed, "host2") if "dev" in d}) == 1, "the usual pace", 30)
    assert min(client.stop()[0] for client in clients) > 100


def _listen(bed: Bed) -> subprocess.Popen[str]:
    """Count the frames from the container's MAC that come in from host2's side, for as long as a move takes."""
    code = f"""
import socket, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(('p-host2', 3)); s.settimeout(0.2)  # it hears nothing before that
mac = bytes.fromhex('{MAC.replace(":", "")}'); until = time.monotonic() + 20; count = 0
while time.monotonic() < until:
    try: frame, where = s.recvfrom(2000)
    except TimeoutError: continue
    count += frame[6:12] == mac and where[2] != socket.PACKET_OUTGOING
print(count)
"""
    argv = ["nsenter", f"--net=/run/netns/ferry-{bed.name}-switch", sys.executable, "-c", code]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("place", ["prepare.result:after", "commit.decided:after", "commit.released:after"])
def test_its_coordinator_is_killed(served: Bed, clients: list[Client], place: str) -> None:
    bed = served
    move = Stopped(bed, "host1", place, "migrate", "move", "--json", NAME, "host2")
    move.signal(signal.SIGKILL)
    move.go_on()
    bed.run("host1", "migrate", "recover")
    here, there = ("host2", "host1") if place.startswith("commit") else ("host1", "host2")
    assert bed.status(here, NAME) == "running"
    assert namespaces(bed, here) == [NET] and namespaces(bed, there) == []
    assert min(client.stop()[0] for client in clients) > 10


def test_what_is_in_the_way_is_said(served: Bed) -> None:
    bed = served

    def refused(code: str) -> None:
        done = bed.run("host1", "migrate", "check", "--json", NAME, "host2")
        assert done.returncode == 3
        assert code in {f["code"] for f in json.loads(done.stdout)["findings"] if f["severity"] == "fail"}, done.stdout

    bed.ok("host2", "ip", "netns", "add", NET)
    refused("network-exists")
    bed.ok("host2", "ip", "netns", "del", NET)
    bed.ok("host2", "ip", "addr", "add", f"{ADDRESS}/32", "dev", "lo")
    refused("network-address")
    bed.ok("host2", "ip", "addr", "del", f"{ADDRESS}/32", "dev", "lo")
    bed.ok("host1", "sh", "-ec", "ip link add br1 type bridge; ip link set web0 master br1")
    refused("network-bridge")
    bed.ok("host1", "sh", "-ec", "ip link set web0 nomaster; ip link del br1")
    refused("network-unsupported")
    bed.ok("host1", "sh", "-ec", f"ip link set web0 master br0; ip -n {NET} rule add from 10.0.0.0/8 table 5")
    refused("network-unsupported")
    bed.ok("host1", "ip", "-n", NET, "rule", "del", "from", "10.0.0.0/8", "table", "5")
    other = subprocess.Popen(bed.argv("host1", "ip", "netns", "exec", NET, "sleep", "30"), stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: "sleep" in bed.ok("host1", "sh", "-c", f"ip netns pids {NET} | xargs ps -o comm= -p"), "another one")
        refused("network-shared")
    finally:
        other.kill()
        other.wait()
    wait_for(lambda: bed.run("host1", "migrate", "check", NAME, "host2").returncode == 0, "nothing in the way", 30)


def test_a_restore_that_fails_leaves_no_network(served: Bed) -> None:
    bed = served
    move = Stopped(bed, "host1", "precopy.result:after", "migrate", "move", "--json", NAME, "host2")
    holders = bed.processes("host2", "runtime")
    assert holders
    for pid in holders:
        os.kill(pid, signal.SIGKILL)
    status, _, _ = move.go_on()
    assert status == 4
    assert bed.status("host1", NAME) == "running" and namespaces(bed, "host2") == []
    wait_for(lambda: _connects(bed), "an answer", 30)
