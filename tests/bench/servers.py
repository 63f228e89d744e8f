"""The servers that the benchmark moves: what is in their root, how they are started, and who their clients are.

A load is written `server:size:rate`:

    redis:512:1000       512 MiB of random values, 1000 writes a second (0: as many as are answered)
    postgres:10:100      pgbench of scale 10, 100 transactions a second (0: as many as can be)
    nginx:64:100         a file of 64 KiB, 100 connections that are kept open
    files:100000:10      nginx in a root with 100,000 files, of which 10 a second are written
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import bridged

_POSTGRES = "/usr/lib/postgresql"
_NOBODY = 65534


@dataclass(frozen=True)
class Server:
    """`make` fills a root with what is needed for a size; `argv` is the command inside; `client` the script of its clients."""

    client: str
    port: int
    make: Callable[[Path, int], None]
    argv: Callable[[int, int], Sequence[str]]
    user: int = 0
    unit: str = "MiB"
    rates: str = "writes/s"


def install(program: str, rootfs: Path) -> None:
    """Copy one of this machine's programs, and the libraries that it is linked to, to where it would be in a root of its own."""
    found = shutil.which(program)
    assert found, f"{program} is not installed: scripts/install-packages --tests"
    told = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
    for name in [found, *re.findall(r"(/\S+) \(0x", told)]:
        copy = rootfs / name[1:]
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, copy)


def _redis(rootfs: Path, mib: int) -> None:
    install("redis-server", rootfs)


def _newest_postgres() -> Path:
    return max(Path(_POSTGRES).iterdir(), key=lambda p: float(p.name))


def _postgres(rootfs: Path, scale: int) -> None:
    home = _newest_postgres()
    install(str(home / "bin/postgres"), rootfs)
    share = Path("usr/share/postgresql") / home.name
    shutil.copytree(Path("/") / share, rootfs / share)
    shutil.copytree(
        home / "lib", rootfs / "usr/lib/postgresql" / home.name / "lib", ignore=shutil.ignore_patterns("bitcode", "llvmjit*")
    )
    data = rootfs / "data"
    data.mkdir()
    shutil.chown(data, _NOBODY, _NOBODY)
    initdb = f"cd {data} && exec setpriv --reuid={_NOBODY} --regid={_NOBODY} --clear-groups env TZ=GMT {home}/bin/initdb"
    options = "-D . -U postgres --locale=C --encoding=UTF8 --auth=trust --no-sync"
    subprocess.run(["sh", "-c", f"{initdb} {options}"], check=True, stdout=subprocess.DEVNULL)
    with (data / "pg_hba.conf").open("a") as f:
        f.write("host all all 198.51.100.0/24 trust\n")


def _nginx(rootfs: Path, kib: int) -> None:
    install("nginx", rootfs)
    for directory in ("var/log/nginx", "var/lib/nginx", "www", "run", "many"):
        (rootfs / directory).mkdir(parents=True, exist_ok=True)
    (rootfs / "www/file").write_bytes(b"x" * (kib << 10))
    (rootfs / "etc/nginx.conf").write_text(
        "user root; worker_processes 1; daemon off; pid /run/nginx.pid; error_log /dev/null;\n"
        "events { worker_connections 4096; }\n"
        f"http {{ access_log off; keepalive_timeout 3600; keepalive_requests 100000000; server {{ listen {bridged.ADDRESS}:80; root /www; }} }}\n"
    )


def _files(rootfs: Path, count: int) -> None:
    _nginx(rootfs, 4)
    for number in range(count):
        if number % 1000 == 0:
            directory = rootfs / f"many/{number // 1000}"
            directory.mkdir()
        (directory / str(number)).write_text(f"{number}\n" * 20)


def _redis_argv(mib: int, rate: int) -> Sequence[str]:
    return (
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


def _postgres_argv(scale: int, rate: int) -> Sequence[str]:
    settings = {
        "listen_addresses": bridged.ADDRESS,
        "unix_socket_directories": "",
        "dynamic_shared_memory_type": "mmap",
    }
    return (
        str(_newest_postgres() / "bin/postgres"),
        "-D",
        "/data",
        *(w for k, v in settings.items() for w in ("-c", f"{k}={v}")),
    )


def _nginx_argv(kib: int, connections: int) -> Sequence[str]:
    return ("nginx", "-e", "/dev/null", "-c", "/etc/nginx.conf")


def _files_argv(count: int, rate: int) -> Sequence[str]:
    writer = f"i=0; while :; do i=$((i+1)); echo $i >/many/$((i * 37 % {count // 1000}))/new; usleep {1_000_000 // rate}; done"
    return ("sh", "-c", f"{writer} & exec nginx -e /dev/null -c /etc/nginx.conf")


SERVERS = {
    "redis": Server("redis_client.py", 6379, _redis, _redis_argv),
    "postgres": Server("postgres_client.py", 5432, _postgres, _postgres_argv, _NOBODY, "scale", "transactions/s"),
    "nginx": Server("http_client.py", 80, _nginx, _nginx_argv, unit="KiB", rates="connections"),
    "files": Server("http_client.py", 80, _files, _files_argv, unit="files", rates="files/s"),
}


@dataclass(frozen=True)
class Load:
    """What is moved. Units: `size` in the server's, `rate` in that of its clients."""

    name: str
    size: int
    rate: int

    @classmethod
    def read(cls, text: str) -> Load:
        name, size, rate = text.split(":")
        return cls(name, int(size), int(rate))

    @property
    def server(self) -> Server:
        return SERVERS[self.name]

    def __str__(self) -> str:
        return f"{self.name}, {self.size} {self.server.unit}, {self.rate or 'max'} {self.server.rates}"
