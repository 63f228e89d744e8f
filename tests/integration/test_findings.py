"""What would stand in the way of a checkpoint is said before: each finding by a container that has that very fault.

What CRIU itself then says is explained by the same code.
"""

from __future__ import annotations

import ctypes
import json
import os
import pty
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runtime.criu import features
from runtime.linux.capability import permitted_set
from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.oci import Oci
from tests.helpers.scenario import Parked, Scenario

pytestmark = pytest.mark.ferry
null = subprocess.DEVNULL


@dataclass(frozen=True)
class Fault:
    """`explained` is what CRIU's own failure is called; None where the dump is not prevented by it."""

    code: str
    body: str
    flags: tuple[str, ...] = ()
    severity: str = "fail"
    change: Any = None
    explained: bool = True

    def __str__(self) -> str:
        return f"{self.code} {self.severity}"


def _capability(*names: str) -> Any:
    def change(config: Config) -> None:
        for kind in ("bounding", "effective", "permitted"):
            config["process"]["capabilities"][kind] += names

    return change


def _device(major: int, minor: int) -> Any:
    def change(config: Config) -> None:
        config["linux"]["devices"] = [{"path": "/dev/that", "type": "c", "major": major, "minor": minor, "fileMode": 0o666}]
        config["linux"].setdefault("resources", {})["devices"] = [{"allow": True, "access": "rwm"}]

    return change


def _without_namespace(kind: str) -> Any:
    def change(config: Config) -> None:
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != kind]
        if kind == "pid":  # the host's /proc would show that of the test
            config["linux"]["maskedPaths"] = config["linux"]["readonlyPaths"] = []

    return change


def _overlay(config: Config) -> None:
    options = ["lowerdir=/usr/share:/usr/lib"]
    config["mounts"].append({"destination": "/over", "type": "overlay", "source": "overlay", "options": options})


FAULTS = [
    Fault("io-uring", "p = ctypes.create_string_buffer(120); assert libc.syscall(425, 4, p) >= 0; park()"),
    Fault("anonymous-inode", "assert libc.syscall(323, 1) >= 0; park()"),
    Fault("mptcp", "s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262); s.bind(('127.0.0.1', 77)); s.listen(); park()"),
    Fault("socket-protocol", "s = socket.socket(40, socket.SOCK_STREAM); park()"),
    Fault("inotify-overlay", "n = libc.inotify_init(); assert libc.inotify_add_watch(n, b'/over/doc', 2) > 0; park()", change=_overlay),
    Fault("ghost-file", "f = open('/gone', 'wb'); f.write(b'x' * 100000); f.flush(); os.unlink('/gone'); park()", flags=("--ghost-limit", "4K")),
    Fault("device", "f = open('/dev/that', 'rb'); park()", change=_device(10, 237)),
    Fault("namespace-nested", """
        if os.fork() == 0: assert libc.unshare(0x04000000) == 0; park(); time.sleep(99)
        park()""", change=_capability("CAP_SYS_ADMIN")),
    Fault("mount-type", "os.mkdir('/m'); assert libc.mount(b'ramfs', b'/m', b'ramfs', 0, None) == 0; park()",
          change=_capability("CAP_SYS_ADMIN")),
    Fault("message-queue", "rt = ctypes.CDLL('librt.so.1'); assert rt.mq_open(b'/q', 0o102, 0o600, None) >= 0; park()"),
    Fault("pipe-outside", "r, w = os.pipe(); os.close(r); park()", severity="warn", explained=False),
    Fault("uninterruptible", """
        if libc.vfork() == 0: park(); time.sleep(999)""", severity="warn", explained=False),
    Fault("pid-namespace", "park()", change=_without_namespace("pid"), explained=False),
    Fault("ipc-host", "s = libc.shmget(0, 4096, 0o1600); libc.shmat.restype = ctypes.c_void_p; libc.shmat(s, None, 0); libc.shmctl(s, 0, None); park()",
          change=_without_namespace("ipc"), explained=False),
    Fault("memory-tracking", "park()", flags=("--pre-dump",), severity="warn", explained=False),
    Fault("tcp-in-flight", """
        import subprocess
        s = socket.create_server(('127.0.0.1', 77), backlog=1)
        waiting = [socket.socket() for _ in range(6)]
        for w in waiting: w.setblocking(False); w.connect_ex(('127.0.0.1', 77))
        time.sleep(0.1); park()""", flags=("--tcp-established",), severity="warn", explained=False),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_it_is_found(oci: Oci, bundles: BundleMaker, tmp_path: Path, fault: Fault) -> None:
    parked = Parked(oci, bundles, Scenario(fault.code, fault.body, change=fault.change))
    if fault.code == "memory-tracking" and features.tracks_memory():
        assert fault.code not in parked.findings(*fault.flags)
        return
    assert parked.findings(*fault.flags).get(fault.code) == fault.severity, parked.findings(*fault.flags)
    if fault.explained:
        explained(oci, tmp_path, fault.code, *fault.flags)


def explained(oci: Oci, tmp_path: Path, code: str, *flags: str | Path) -> None:
    """See that CRIU's own failure is told by the code, and that the container runs on."""
    done = oci.run("checkpoint", "--image-path", tmp_path / "images", *flags, "c")
    assert done.returncode == 1 and f"[{code}]" in done.stderr, done.stderr
    assert oci.status("c") == "running"


def findings(oci: Oci, *flags: str | Path, **kwargs: Any) -> dict[str, str]:
    done = oci.run("checkpoint", "--check", "--json", *flags, "c", **kwargs)
    assert done.returncode in (0, 4), done.stderr
    return {f["code"]: f["severity"] for f in json.loads(done.stdout)}


def test_with_nothing_to_say_it_is_ready(oci: Oci, counting: Path) -> None:
    assert findings(oci) == {"ready": "ok"}
    done = oci.run("checkpoint", "--check", "c")
    assert done.returncode == 0 and done.stdout.startswith("ok ") and "[ready]" in done.stdout
    assert oci.status("c") == "running"


def test_names_that_are_no_text(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """A program may call itself, and its files, what it likes; nobody's checkpoint, and no verb, minds."""
    body = r"""
        libc.prctl(15, bytes([255, 254]), 0, 0, 0); f = open(b'/\xff', 'w'); g = open(b'/gone\xff', 'w'); os.unlink(b'/gone\xff')
        m = os.open(b'/map\xff', os.O_RDWR | os.O_CREAT); os.ftruncate(m, 4096); v = mmap.mmap(m, 4096); os.unlink(b'/map\xff')
        s = socket.socket(socket.AF_UNIX); s.bind(b'/sock\xff'); s.listen(); park(); assert f.write('x')"""
    parked = Parked(oci, bundles, Scenario("names", body))
    assert parked.findings() == {"ready": "ok"}
    assert "x (" not in oci.run("checkpoint", "--check", "--ghost-limit", "0", "c").stderr
    assert oci.status("c") == "running"
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    parked.restore(tmp_path / "images")
    parked.looks()
    oci.ok("kill", "c", "KILL")


def test_exec_session(oci: Oci, counting: Path, tmp_path: Path) -> None:
    oci.ok("exec", "--detach", "c", "sleep", "100", stdout=null, stderr=null)
    done = oci.run("checkpoint", "--check", "c")
    assert done.returncode == 4 and "(sleep) was started by exec [exec-session]" in done.stdout
    explained(oci, tmp_path, "exec-session")


def test_terminal(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """A terminal of the caller's, which is not the container's own."""
    master, slave = pty.openpty()
    bundle = bundles("sleep", "100")
    assert oci.run("run", "--detach", "--bundle", bundle, "c", stdin=slave, stdout=slave, stderr=slave).returncode == 0
    assert findings(oci)["terminal"] == "fail"
    explained(oci, tmp_path, "terminal")
    assert "terminal" not in findings(oci, "--shell-job")
    oci.ok("delete", "--force", "c")
    os.close(master)
    os.close(slave)


def test_file_outside(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        assert oci.run("run", "--detach", "--bundle", bundles("sleep", "100"), "c", stdout=out, stderr=null).returncode == 0
    done = oci.run("checkpoint", "--check", "c")
    assert (
        done.returncode == 0 and f"descriptor 1 of a file outside of the container: {tmp_path}/out [file-outside]" in done.stdout
    )


def test_traced(oci: Oci, counting: Path, tmp_path: Path) -> None:
    pid = oci.state("c")["pid"]
    tracer = subprocess.Popen(["strace", "-qq", "-o", "/dev/null", "-p", str(pid)])
    try:
        while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
            pass
        assert findings(oci)["traced"] == "fail"
        explained(oci, tmp_path, "traced")
    finally:
        tracer.terminate()
        tracer.wait()
    assert "traced" not in findings(oci)


def test_unix_outside(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """As with syslog, D-Bus or an engine's socket."""
    (tmp_path / "host").mkdir()
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        server.bind(str(tmp_path / "host/stream"))
        server.listen()  # whoever connects is never accepted
        log.bind(str(tmp_path / "host/dgram"))

        def change(config: Config) -> None:
            # At the same path: by the name that it was bound to, the restored socket is connected again.
            place = str(tmp_path / "host")
            config["mounts"].append({"destination": place, "type": "bind", "source": place, "options": ["bind"]})

        stream = f"s = socket.socket(socket.AF_UNIX); s.connect('{tmp_path}/host/stream'); park()"
        Parked(oci, bundles, Scenario("stream", stream, change=change))
        assert findings(oci)["unix-outside"] == "fail" and findings(oci, "--ext-unix-sk")["unix-outside"] == "fail"
        explained(oci, tmp_path, "unix-outside")
        oci.ok("delete", "--force", "c")
        dgram = (
            f"s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect('{tmp_path}/host/dgram'); park(); s.send(b'after')"
        )
        # CRIU does not see a peer in another network namespace.
        Parked(oci, bundles, Scenario("dgram", dgram, change=change))
        assert findings(oci, "--ext-unix-sk")["unix-outside"] == "fail"
        explained(oci, tmp_path, "unix-outside", "--ext-unix-sk")

        def of_host(config: Config) -> None:
            change(config)
            _without_namespace("network")(config)

        oci.ok("delete", "--force", "c")
        parked = Parked(oci, bundles, Scenario("dgram", dgram, change=of_host, flags=("--ext-unix-sk",)))
        assert findings(oci)["unix-outside"] == "fail"
        explained(oci, tmp_path, "unix-outside")
        assert "unix-outside" not in findings(oci, "--ext-unix-sk")
        oci.ok("checkpoint", "--ext-unix-sk", "--image-path", tmp_path / "images", "c")
        parked.restore(tmp_path / "images")
        parked.looks()
        assert log.recv(10) == b"after"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_space(oci: Oci, counting: Path, small: Path) -> None:
    assert findings(oci, "--image-path", small / "images")["space"] == "fail"
    done = oci.run("checkpoint", "--image-path", small / "images", "c")
    assert done.returncode == 1 and "[space]" in done.stderr
    assert oci.status("c") == "running"


def test_criu_missing(oci: Oci, counting: Path) -> None:
    environment = {**os.environ, "FERRY_CRIU": "/no/criu"}
    assert findings(oci, env=environment)["criu-missing"] == "fail"


def test_criu_that_does_not_work(oci: Oci, counting: Path) -> None:
    assert findings(oci, env={**os.environ, "FERRY_CRIU": "/bin/false"})["criu-missing"] == "fail"


def test_config_file(oci: Oci, counting: Path, tmp_path: Path) -> None:
    """CRIU reads it, and what stands there counts more than our options: that is said."""
    (tmp_path / "criu.conf").write_text("# mine\nverbosity 4\ntcp-established\n")
    environment = {**os.environ, "CRIU_CONFIG_FILE": str(tmp_path / "criu.conf")}
    assert findings(oci, env=environment) == {"config-file": "warn", "ready": "ok"}
    done = oci.run("checkpoint", "--leave-running", "--image-path", tmp_path / "images", "c", env=environment)
    assert done.returncode == 0 and "criu.conf sets tcp-established" in done.stderr


def test_network_lock(oci: Oci, bundles: BundleMaker, tmp_path: Path, network: str) -> None:
    bundle = bundles("sleep", "100", change=lambda c: _join(c, network))
    oci.detached(bundle, "c")
    assert "network-lock" not in findings(oci)
    (tmp_path / "bin").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "bin")}
    # What is not on PATH is looked for in the system's directories, too: hide them.
    hidden = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /usr/sbin && exec "$@"', str(tmp_path / "bin")]
    done = subprocess.run(
        [*hidden, *oci.argv("checkpoint", "--check", "--json", "c")],
        env=environment | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert {f["code"]: f["severity"] for f in json.loads(done.stdout)}["network-lock"] == "fail", done.stderr


def _join(config: Config, network: str) -> None:
    for n in config["linux"]["namespaces"]:
        if n["type"] == "network":
            n["path"] = f"/run/netns/{network}"


@pytest.fixture
def network() -> Iterator[str]:
    name = f"ferry-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1"], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def test_namespace_owner(oci: Oci, bundles: BundleMaker, tmp_path: Path, network: str) -> None:
    def change(config: Config) -> None:
        _join(config, network)
        config["linux"]["namespaces"].append({"type": "user"})
        for kind in ("uidMappings", "gidMappings"):
            config["linux"][kind] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
        config["mounts"] = [m for m in config["mounts"] if not m["destination"].startswith("/sys")]

    oci.detached(bundles("sleep", "100", change=change), "c")
    assert findings(oci)["namespace-owner"] == "fail"
    explained(oci, tmp_path, "namespace-owner")


def test_namespace_joined(oci: Oci, counting: Path, bundles: BundleMaker) -> None:
    """As in a pod, whose containers share some."""
    pid = oci.state("c")["pid"]

    def change(config: Config) -> None:
        next(n for n in config["linux"]["namespaces"] if n["type"] == "ipc")["path"] = f"/proc/{pid}/ns/ipc"

    oci.detached(bundles("sleep", "100", change=change), "d")
    done = oci.run("checkpoint", "--check", "d")
    assert done.returncode == 0 and "warn  the container joins a namespace (ipc)" in done.stdout


def test_resource_capability(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles("sleep", "100", change=lambda c: c["process"].update(user={"uid": 1000, "gid": 1000}))
    oci.detached(bundle, "c")
    if "CAP_SYS_RESOURCE" in permitted_set():
        assert findings(oci) == {"ready": "ok"}
        oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    else:
        assert findings(oci)["resource-capability"] == "fail"
        explained(oci, tmp_path, "resource-capability")


def test_mount_source(oci: Oci, counting: Path, tmp_path: Path) -> None:
    """A part of a file system that was put into the container from outside, and that its document knows nothing of."""
    source = tmp_path / "elsewhere"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", source], check=True)
    try:
        (source / "part").mkdir()
        (counting / "rootfs/part").mkdir()
        script = (
            "import os, sys; from runtime.linux import const, mount, namespace\n"
            "tree = mount.open_tree(sys.argv[1], recursive=False)\n"
            "namespace.setns(os.open(f'/proc/{sys.argv[2]}/ns/mnt', os.O_RDONLY), const.CLONE_NEWNS)\n"
            "mount.move_mount(tree, os.open('/part', os.O_PATH | os.O_DIRECTORY))\n"
        )
        pid = str(oci.state("c")["pid"])
        subprocess.run([sys.executable, "-c", script, source / "part", pid], check=True, cwd=Path(__file__).parents[2])
        assert findings(oci)["mount-source"] == "fail"
        explained(oci, tmp_path, "mount-source")
    finally:
        oci.ok("delete", "--force", "c")
        subprocess.run(["umount", "-l", source], check=True)


def _offset_of_entry(elf: bytes) -> int:
    """Return where in an ELF file its first instruction is. Source: elf(5)."""
    entry, headers = struct.unpack_from("<QQ", elf, 24)
    size, count = struct.unpack_from("<HH", elf, 54)
    for at in range(headers, headers + size * count, size):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", elf, at)
        if kind == 1 and address <= entry < address + length:
            return int(entry - address + offset)
    raise AssertionError("no segment has the entry")


def test_uprobes(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """As a tracer sets them: on an instruction of the container's program, which has come by there."""
    kind = Path("/sys/bus/event_source/devices/uprobe/type")
    if not kind.exists():
        pytest.skip("the kernel has no uprobes")
    bundle = bundles("sleep", "100")
    busybox = bundle / "rootfs/bin/busybox"
    name = ctypes.create_string_buffer(os.fsencode(busybox))
    attr = (ctypes.c_uint64 * 16)(int(kind.read_text()) | 128 << 32)
    attr[7], attr[8] = ctypes.addressof(name), _offset_of_entry(busybox.read_bytes())
    fd = ctypes.CDLL(None, use_errno=True).syscall(298, attr, -1, 0, -1, 8)  # perf_event_open(2)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    try:
        oci.detached(bundle, "c")
        assert findings(oci).get("uprobes") == "fail"
        explained(oci, tmp_path, "uprobes")
    finally:
        os.close(fd)
