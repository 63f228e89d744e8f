"""A container whose network CNI has made: made anew by the target's plugins, with the same addresses, lease and published ports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.test_move import BUNDLE, NAME, start_python
from tests.helpers.bed import Bed
from tests.helpers.oci import wait_for

NET, NETWORK, ID = "web", "ferrytest", "cnitool-0123456789"
MAC, ADDRESS = "02:fe:00:00:02:40", "198.51.100.40"
PUBLISHED = 8007
SERVER = """
import socket, threading
l = socket.create_server(('0.0.0.0', 7))
open('/up', 'w')
def serve(s):
    n = 0
    while s.recv(1): n += 1; s.sendall(b'%d\\n' % n)
while True: threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
"""
RELAY = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20).makefile('rw')
while sys.stdin.readline(): s.write('x'); s.flush(); print(s.readline(), end='', flush=True)
"""
# What an administrator does by a tool of CNI's: the namespace, and the plugins.
ATTACH = f"""
import subprocess
from migrate import cni
from migrate.network import Address, Attachment, Interface
subprocess.run(['ip', 'netns', 'add', '{NET}'], check=True)
subprocess.run(['ip', '-n', '{NET}', 'link', 'set', 'lo', 'up'], check=True)
ports = [{{'hostPort': {PUBLISHED}, 'containerPort': 7, 'protocol': 'tcp'}}]
made = Attachment('{NETWORK}', 'eth0', '{ID}', (), {{'portMappings': ports}})
cni.add('{NET}', made, Interface('eth0', '{MAC}', 1500, '', '', (Address('{ADDRESS}/24'),)))
"""


def configure(bed: Bed, host: str, first: str = ADDRESS, last: str = "198.51.100.60") -> None:
    """Give a host a CNI network on its bridge, of its own."""
    plugins: list[dict[str, Any]] = [
        {
            "type": "bridge",
            "bridge": "br0",
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "198.51.100.0/24", "rangeStart": first, "rangeEnd": last}]],
                "routes": [{"dst": "0.0.0.0/0", "gw": "198.51.100.100"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "tuning", "sysctl": {"net.core.somaxconn": "77"}},
    ]
    text = json.dumps({"cniVersion": "0.4.0", "name": NETWORK, "plugins": plugins})
    script = f"mkdir -p /etc/cni/net.d; mountpoint -q /etc/cni/net.d || mount -t tmpfs cni /etc/cni/net.d; echo '{text}' >/etc/cni/net.d/10-test.conflist"
    bed.ok(host, "sh", "-ec", script)


@pytest.fixture
def served(bed: Bed) -> Iterator[Bed]:
    """A bed with a server on host1 that a CNI network is attached to."""
    configure(bed, "host1")
    bed.ok("host1", "python3", "-c", ATTACH)
    start_python(bed, SERVER, NET)
    wait_for((bed.path("host1", BUNDLE) / "rootfs/up").exists, "the server", 30)
    yield bed
    bed.clean()
    detach = f"from migrate import netns; netns.remove('{NET}')"
    for host in ("host1", "host2"):
        bed.run(host, "python3", "-c", detach)
        bed.run(host, "sh", "-c", "umount /etc/cni/net.d; rm -rf /var/lib/cni")


class Client:
    def __init__(self, bed: Bed, address: str, port: int) -> None:
        argv = ["nsenter", f"--net=/run/netns/ferry-{bed.name}-client", sys.executable, "-c", RELAY, address, str(port)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def asked_once(bed: Bed, address: str, port: int) -> str:
    client = Client(bed, address, port)
    try:
        return client.ask()
    finally:
        client.close()


def published(bed: Bed, host: str, address: str) -> bool:
    """Say whether a program on the host reaches the container by the host's own port.

    Clients on the same network would be answered by the container itself, not by the address that they have asked.
    """
    done = bed.run(host, "python3", "-c", RELAY, address, str(PUBLISHED), input="\n")
    return done.stdout == "1\n"


def kept(bed: Bed, host: str) -> dict[str, list[str]]:
    """Return what a host keeps of CNI: leases, what is remembered, published ports, namespaces, ends of cables."""
    leases = bed.path(host, f"/var/lib/cni/networks/{NETWORK}")
    cache = bed.path(host, "/var/lib/cni/results")
    return {
        "leases": [p.name for p in leases.iterdir() if p.name[0].isdigit()] if leases.exists() else [],
        "remembered": [p.name for p in cache.iterdir()] if cache.exists() else [],
        "published": [line for line in bed.ok(host, "nft", "list", "ruleset").splitlines() if f"{ADDRESS}:7" in line],
        "namespaces": bed.ok(host, "ls", "/run/netns").split(),
        "veths": [
            d["ifname"] for d in json.loads(bed.ok(host, "ip", "-j", "link", "show", "type", "veth")) if d["ifname"] != "eth0"
        ],
        "muted": [line for line in bed.ok(host, "nft", "list", "tables").splitlines() if " ferry" in line],
    }


NOTHING: dict[str, list[str]] = {k: [] for k in ("leases", "remembered", "published", "namespaces", "veths", "muted")}


def test_it_moves_with_its_lease_and_published_ports(served: Bed) -> None:
    bed = served
    configure(bed, "host2")
    before = kept(bed, "host1")
    assert (before["leases"], before["namespaces"]) == ([ADDRESS], [NET])
    link = bed.ok("host1", "ip", "-n", NET, "-br", "addr")
    client = Client(bed, ADDRESS, 7)
    assert client.ask() == "1"
    assert published(bed, "host1", "198.51.100.1")
    for here, there, at in (("host1", "host2", "198.51.100.2"), ("host2", "host1", "198.51.100.1")):
        count = int(client.ask())
        bed.move(here, NAME, there)
        assert int(client.ask()) == count + 1
        assert kept(bed, here) == NOTHING
        after = kept(bed, there)
        assert {k: after[k] for k in ("leases", "remembered", "namespaces")} == {
            k: before[k] for k in ("leases", "remembered", "namespaces")
        }
        assert len(after["published"]) == len(before["published"]) > 0 and after["muted"] == []
        assert strip(bed.ok(there, "ip", "-n", NET, "-br", "addr")) == strip(link)
        assert MAC in bed.ok(there, "ip", "-n", NET, "link")
        assert published(bed, there, at)
    client.close()


def strip(text: str) -> list[str]:
    """Leave out the other end's number."""
    return [" ".join([line.split()[0].partition("@")[0], *line.split()[1:]]) for line in text.splitlines()]


def test_a_plugin_that_fails_leaves_nothing(served: Bed) -> None:
    """The target's network does not have the address: its IPAM plugin says so."""
    bed = served
    configure(bed, "host2", "198.51.100.70", "198.51.100.80")
    done = bed.run("host1", "migrate", "move", NAME, "host2")
    assert (done.returncode == 4 and "host-local" in done.stderr) or "the CNI plugin bridge" in done.stderr, done.stderr
    assert kept(bed, "host2") == NOTHING
    assert bed.status("host1", NAME) == "running" and asked_once(bed, ADDRESS, 7) == "1"


def test_a_network_that_the_target_does_not_have(served: Bed) -> None:
    bed = served
    bed.ok("host2", "sh", "-ec", "mkdir -p /etc/cni/net.d; mount -t tmpfs cni /etc/cni/net.d")
    done = bed.run("host1", "migrate", "check", "--json", NAME, "host2")
    assert done.returncode == 3
    assert "network-cni" in {f["code"] for f in json.loads(done.stdout)["findings"] if f["severity"] == "fail"}
