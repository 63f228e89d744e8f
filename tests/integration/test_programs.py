"""Real servers with clients that stay connected: what they have in memory and what they were saying goes on."""

from __future__ import annotations

import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.linux.capability import permitted_set
from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.oci import Oci
from tests.helpers.scenario import Parked, Scenario
from tests.helpers.served import SERVER, Client, Network, Server

pytestmark = pytest.mark.ferry
null = subprocess.DEVNULL


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
