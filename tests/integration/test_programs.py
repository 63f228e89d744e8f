"""Real servers with clients that stay connected: what they have in memory and what they were saying goes on."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.linux.capability import permitted_set
from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.memory import system
from tests.helpers.oci import Oci, wait_for
from tests.helpers.scenario import Parked, Scenario

pytestmark = pytest.mark.ferry
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


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(f"ferry-{os.getpid()}") as n:
        yield n


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


@pytest.mark.parametrize("lazy", [False, True])
def test_redis(oci: Oci, bundles: BundleMaker, network: Network, tmp_path: Path, lazy: bool) -> None:
    argv = ["/usr/bin/redis-server", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no", "--port", "6379"]
    server = Server(oci, bundles, network, argv, None)
    server.start(6379)
    client, other = Client.tcp(network, 6379), Client.tcp(network, 6379)
    for n in range(50):
        assert client.ask(f"SET key{n} {'x' * 100}{n}\\r\\n") == repr(b"+OK\r\n")
    assert other.ask("DEBUG POPULATE 20000\\r\\n") == repr(b"+OK\r\n") or True
    assert client.ask("MULTI\\r\\n") == repr(b"+OK\r\n")
    assert client.ask("INCR counter\\r\\n") == repr(b"+QUEUED\r\n")
    server.away_and_back(tmp_path / "images", *(["--lazy-pages"] if lazy else []))
    assert client.ask("EXEC\\r\\n") == repr(b"*1\r\n:1\r\n"), "the transaction that was open"
    assert other.ask("GET key49\\r\\n") == repr(b"$102\r\n" + b"x" * 100 + b"49\r\n")
    new = Client.tcp(network, 6379)
    assert new.ask("PING\\r\\n") == repr(b"+PONG\r\n")
    for c in (client, other, new):
        c.close()


def _may_change_user(config: Config) -> None:
    for kind in ("bounding", "effective", "permitted"):
        config["process"]["capabilities"][kind] += ["CAP_SETUID", "CAP_SETGID"]


def test_nginx(oci: Oci, bundles: BundleMaker, network: Network, tmp_path: Path) -> None:
    server = Server(oci, bundles, network, ["/usr/sbin/nginx", "-p", "/", "-c", "/nginx.conf"], _may_change_user)
    root = server.bundle / "rootfs"
    (root / "www").mkdir()
    (root / "www/page").write_text("hello")
    (root / "nginx.conf").write_text(
        "daemon off; user root; worker_processes 2; pid /run/nginx.pid; error_log /run/error.log;"
        "events {} http { access_log off; keepalive_timeout 600; client_body_temp_path /run/a; proxy_temp_path /run/b;"
        "fastcgi_temp_path /run/c; uwsgi_temp_path /run/d; scgi_temp_path /run/e; server { listen 80; root /www; } }"
    )
    server.start(80)
    client = Client.tcp(network, 80)
    request = "GET /page HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"
    assert client.ask(request).endswith("\\r\\n\\r\\nhello'")
    server.away_and_back(tmp_path / "images")
    assert client.ask(request).endswith("\\r\\n\\r\\nhello'"), "the connection that was kept alive"
    client.close()
    for _ in range(4):
        new = Client.tcp(network, 80)
        assert new.ask(request).endswith("hello'")
        new.close()


def test_nodejs(oci: Oci, bundles: BundleMaker, network: Network, tmp_path: Path) -> None:
    program = (
        "let n = 0, t = 0; setInterval(() => t++, 20);"
        "require('net').createServer(s => s.on('data', d => s.write(`${++n} ${t > 0} ${d}`))).listen(8000, '0.0.0.0')"
    )
    server = Server(oci, bundles, network, ["/usr/bin/node", "-e", program], None)
    server.start(8000)
    client = Client.tcp(network, 8000)
    assert client.ask("a") == repr(b"1 true a\n") or client.ask("a")
    first = int(client.ask("b").split("'")[1].split()[0])
    server.away_and_back(tmp_path / "images")
    assert client.ask("c") == repr(f"{first + 1} true c\n".encode())
    client.close()


def test_python(oci: Oci, bundles: BundleMaker, network: Network, tmp_path: Path) -> None:
    program = (
        "import asyncio, threading, time\n"
        "n = 0; t = 0\n"
        "def run():\n  global t\n  while True: t += 1; time.sleep(0.01)\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "async def serve(r, w):\n  global n\n"
        "  while line := await r.readline(): n += 1; w.write(b'%d %d ' % (n, t > 0) + line)\n"
        "async def main():\n  await (await asyncio.start_server(serve, '0.0.0.0', 8000)).serve_forever()\n"
        "asyncio.run(main())"
    )
    server = Server(oci, bundles, network, ["/usr/bin/python3", "-c", program], None)
    server.start(8000)
    client = Client.tcp(network, 8000)
    assert client.ask("a") == repr(b"1 1 a\n")
    server.away_and_back(tmp_path / "images")
    assert client.ask("b") == repr(b"2 1 b\n")
    client.close()


def _postgres(config: Config) -> None:
    """PostgreSQL wants a user that is not root; where CRIU cannot read the limits of others, in a user namespace."""
    user = pwd.getpwnam("postgres")
    config["process"]["user"] = {"uid": user.pw_uid, "gid": user.pw_gid}
    config["process"]["capabilities"] = {}
    for place in ("/dev/shm", "/run"):
        config["mounts"].append({"destination": place, "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})
    if "CAP_SYS_RESOURCE" not in permitted_set():
        config["linux"]["namespaces"].append({"type": "user"})
        for kind in ("uidMappings", "gidMappings"):
            config["linux"][kind] = [{"containerID": 0, "hostID": 0, "size": 65536}]


def test_postgresql(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """A transaction that is open, a table that only its session sees, and both ends of the connection in the container."""
    programs = max(Path("/usr/lib/postgresql").iterdir()) / "bin"
    body = f"""
        import subprocess
        os.mkdir('/tmp/data', 0o700); os.environ['PGTZ'] = 'UTC'
        init = ['{programs}/initdb', '-D', '/tmp/data', '-A', 'trust', '-E', 'UTF8', '--locale=C', '--no-sync']
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        out = open('/tmp/log', 'w')
        server = ['{programs}/postgres', '-D', '/tmp/data', '-h', '127.0.0.1', '-k', '/run', '-c', 'fsync=off', '-c', 'shared_buffers=16MB']
        subprocess.Popen(server, stdout=out, stderr=out)
        ready = ['{programs}/pg_isready', '-q', '-h', '127.0.0.1']
        while subprocess.run(ready).returncode: time.sleep(0.05)
        def session():
            argv = ['{programs}/psql', '-qAtX', '-h', '127.0.0.1', '-U', 'postgres', 'postgres']
            return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        def ask(psql, line):
            psql.stdin.write(line + chr(10)); return psql.stdout.readline().strip()
        a, b = session(), session()
        assert ask(a, 'create table t as select generate_series(1, 1000) n; select 1;') == '1'
        assert ask(a, 'begin; create temp table mine as select 7 n; update t set n = n + 1; select sum(n) from t;') == '501500'
        assert ask(b, 'select sum(n) from t;') == '500500'
        park()
        assert ask(a, 'select n from mine;') == '7' and ask(b, 'select sum(n) from t;') == '500500'
        assert ask(a, 'commit; select sum(n) from t;') == '501500' and ask(b, 'select sum(n) from t;') == '501500'
        assert ask(session(), 'select count(*), pg_is_in_recovery() from t;') == '1000|f'
    """

    def known_user(rootfs: Path) -> None:
        user = pwd.getpwnam("postgres")
        (rootfs / "etc/passwd").write_text(f"postgres:x:{user.pw_uid}:{user.pw_gid}::/:/bin/sh\n")

    parked = Parked(oci, bundles, Scenario("postgresql", body, flags=("--tcp-established",), change=_postgres), known_user)
    oci.ok("checkpoint", "--tcp-established", "--image-path", tmp_path / "images", "c")
    parked.restore(tmp_path / "images")
    parked.looks()


def test_a_client_that_speaks_meanwhile_loses_nothing(oci: Oci, bundles: BundleMaker, network: Network, tmp_path: Path) -> None:
    """What is sent while the server is away is dropped by the lock, sent again, and answered, each byte once."""
    program = (
        "import socket\ns = socket.create_server(('0.0.0.0', 8000)); c, _ = s.accept()\n"
        "while data := c.recv(65536): c.sendall(data)"
    )
    server = Server(oci, bundles, network, ["/usr/bin/python3", "-c", program], None)
    server.start(8000)
    client = [
        "nsenter", f"--net=/run/netns/{network.client}", sys.executable, "-c",
        "import socket, sys, threading, time\n"
        f"s = socket.create_connection(('{SERVER}', 8000)); got = bytearray()\n"
        "sent = b''.join(b'%08d' % i for i in range(100000))\n"
        "def send():\n"
        "  for i in range(0, len(sent), 4000): s.sendall(sent[i:i + 4000]); time.sleep(0.01)\n"
        "  s.shutdown(1)\n"
        "threading.Thread(target=send).start(); print('sending', flush=True)\n"
        "while data := s.recv(65536): got += data\n"
        "print(bytes(got) == sent)",
    ]  # fmt: skip
    process = subprocess.Popen(client, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "sending\n"
    server.away_and_back(tmp_path / "images")
    assert process.stdout.readline() == "True\n"
    assert process.wait(30) == 0
