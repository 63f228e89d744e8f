"""Servers in containers whose clients are in another network namespace, and stay connected."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.memory import system
from tests.helpers.oci import Oci, wait_for

null = subprocess.DEVNULL
SERVER, CLIENT = "198.51.100.1", "198.51.100.2"
_RELAY = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
while line := sys.stdin.buffer.readline():
    s.sendall(line.decode().encode('latin-1').decode('unicode_escape').encode('latin-1'))
    sys.stdout.buffer.write(repr(s.recv(65536)).encode() + b'\\n'); sys.stdout.flush()
"""


class Network:
    """The container's network namespace and the clients', joined by a cable."""

    def __init__(self, name: str) -> None:
        self.server, self.client = f"{name}-s", f"{name}-c"

    def __enter__(self) -> Network:
        for ns in (self.server, self.client):
            self._ip("netns", "add", ns)
        self._ip("link", "add", "eth0", "netns", self.server, "type", "veth", "peer", "name", "eth0", "netns", self.client)
        for ns, address in ((self.server, SERVER), (self.client, CLIENT)):
            self._ip("-n", ns, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip("-n", ns, "link", "set", device, "up")
        return self

    def __exit__(self, *exc: object) -> None:
        for ns in (self.server, self.client):
            self._ip("netns", "del", ns)

    @staticmethod
    def _ip(*args: str) -> None:
        subprocess.run(["ip", *args], check=True)

    def rules(self) -> str:
        """Return the firewall rules in the container's namespace."""
        inside = ["nsenter", f"--net=/run/netns/{self.server}"]
        nft = subprocess.run([*inside, "nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
        return nft.strip()


class Client:
    """A program in the clients' network that is told what to say and tells what it hears."""

    def __init__(self, network: Network, *argv: str) -> None:
        inside = ["nsenter", f"--net=/run/netns/{network.client}", *argv]
        self._process = subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @classmethod
    def tcp(cls, network: Network, port: int) -> Client:
        return cls(network, sys.executable, "-c", _RELAY, SERVER, str(port))

    def ask(self, line: str) -> str:
        """Say a line; return the line that comes back."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)


class Server:
    """A container that serves in the network, its bundle, and the way away and back."""

    def __init__(
        self, oci: Oci, bundles: BundleMaker, network: Network, argv: list[str], change: Callable[[Config], Any] | None
    ) -> None:
        self.oci, self.network = oci, network

        def whole(config: Config) -> None:
            system(config)
            config["mounts"].append({"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})
            next(n for n in config["linux"]["namespaces"] if n["type"] == "network")["path"] = f"/run/netns/{network.server}"
            if change:
                change(config)

        self.bundle = bundles(*argv, change=whole)

    def start(self, port: int) -> None:
        self.oci.detached(self.bundle, "c")
        inside = ["nsenter", f"--net=/run/netns/{self.network.server}", "ss", "-Hltn", f"sport = {port}"]
        wait_for(lambda: subprocess.run(inside, capture_output=True, check=True).stdout, "the server listening", 30)

    def away_and_back(self, images: Path, *options: str) -> None:
        self.oci.ok("checkpoint", "--tcp-established", "--image-path", images, "c")
        assert "does not exist" in self.oci.run("state", "c").stderr
        argv = ("restore", "--detach", "--tcp-established", "--bundle", self.bundle, "--image-path", images, *options, "c")
        done = self.oci.run(*argv, stdout=null, stderr=null)
        assert done.returncode == 0, (images / "restore.log").read_text()
        assert self.network.rules() == "", "CRIU's lock is still there"
