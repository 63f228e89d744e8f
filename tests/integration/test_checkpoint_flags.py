"""The flags of `checkpoint` and `restore` that need more than a container: servers of pages, locks, descriptors, terminals."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.criu import images
from tests.helpers.bundle import BundleMaker, Config, assert_gapless, counter, numbers
from tests.helpers.memory import Memory
from tests.helpers.oci import CRIU, Oci, wait_for
from tests.helpers.scenario import Parked, Scenario
from tests.helpers.served import Client, Network, Server

pytestmark = pytest.mark.ferry
null = subprocess.DEVNULL
ECHO = "import socket\ns = socket.create_server(('0.0.0.0', 8000)); c, _ = s.accept()\nwhile d := c.recv(9999): c.sendall(d)"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def restored(oci: Oci, bundle: Path, image_path: Path, *options: str | Path) -> None:
    argv = ("restore", "--detach", "--image-path", image_path, "--bundle", bundle, *options, "c")
    done = oci.run(*argv, stdout=null, stderr=null)
    assert done.returncode == 0, (image_path / "restore.log").read_text()


@contextlib.contextmanager
def page_server(directory: Path, port: int) -> Iterator[None]:
    directory.mkdir()
    server = subprocess.Popen([CRIU, "page-server", "-D", directory, "--address", "127.0.0.1", "--port", str(port)], stdout=null)
    try:
        wait_for(lambda: f":{port:04X} " in Path("/proc/net/tcp").read_text(), "the page server")
        yield
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()


def test_memory_to_a_page_server(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """The memory goes there by itself, the rest is brought there."""
    memory = Memory(oci, bundles, 16)
    port = free_port()
    with page_server(tmp_path / "there", port):
        oci.ok("checkpoint", "--page-server", f"127.0.0.1:{port}", "--image-path", tmp_path / "here", "c")
    assert not list((tmp_path / "here").glob("pages-*.img"))
    assert sum(p.stat().st_size for p in (tmp_path / "there").glob("pages-*.img")) > 16 << 20
    for file in (tmp_path / "here").iterdir():
        shutil.copy(file, tmp_path / "there")
    restored(oci, memory.bundle, tmp_path / "there")
    memory.ask()


def test_a_page_server_that_is_not_there(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 4)
    done = oci.run("checkpoint", "--page-server", f"127.0.0.1:{free_port()}", "--image-path", tmp_path / "images", "c")
    assert done.returncode == 1 and "[page-server]" in done.stderr, done.stderr
    assert oci.status("c") == "running"
    memory.ask()


@pytest.fixture
def large_pipes() -> Iterator[None]:
    """Without CAP_SYS_RESOURCE the pipes that CRIU keeps memory in must be allowed to be large."""
    wanted = {"pipe-max-size": "33554432", "pipe-user-pages-soft": "0"}
    before = {name: Path("/proc/sys/fs", name).read_text() for name in wanted}
    for name, value in wanted.items():
        Path("/proc/sys/fs", name).write_text(value)
    yield
    for name, value in before.items():
        Path("/proc/sys/fs", name).write_text(value)


@pytest.mark.usefixtures("large_pipes")
def test_lazy_pages_from_a_page_server(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """The container's own checkpoint serves its memory, page by page, to the restored one."""
    memory = Memory(oci, bundles, 16)
    port = free_port()
    ready, status = os.pipe()
    argv = oci.argv(
        "checkpoint",
        "--lazy-pages",
        "--page-server",
        f"127.0.0.1:{port}",
        "--status-fd",
        str(status),
        "--image-path",
        tmp_path / "images",
        "c",
    )
    source = subprocess.Popen(argv, pass_fds=(status,), stdin=null, stdout=null, stderr=subprocess.PIPE, text=True)
    os.close(status)
    assert os.read(ready, 1) == b"\0", "memory can be fetched"
    os.close(ready)
    assert sum(p.stat().st_size for p in (tmp_path / "images").glob("pages-*.img")) < 4 << 20
    other = Oci(tmp_path / "other-state")
    argv = ("restore", "--detach", "--lazy-pages", "--page-server", f"127.0.0.1:{port}", "--image-path", tmp_path / "images")
    # The same cgroups are taken by the one that serves; the restored one has a document of its own.
    bundle = bundles("true", change=lambda c: c.update(_elsewhere(memory.bundle)))
    shutil.rmtree(bundle / "rootfs")
    (bundle / "rootfs").symlink_to(memory.bundle / "rootfs")
    done = other.run(*argv, "--bundle", bundle, "c", stdout=null, stderr=null)
    assert done.returncode == 0, (tmp_path / "images/restore.log").read_text()
    memory.ask()
    assert source.wait(30) == 0, source.stderr and source.stderr.read()
    assert "does not exist" in oci.run("state", "c").stderr
    other.delete_all()


def _elsewhere(bundle: Path) -> Config:
    import json

    config: Config = json.loads((bundle / "config.json").read_text())
    config["linux"]["cgroupsPath"] = f"/ferry-test-{os.getpid()}"
    return config


def test_memory_is_served_at_its_address_alone(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """And a verb that is killed leaves no server; the container is frozen, since a copy of it may run."""
    bundle = bundles(*counter())
    oci.detached(bundle, "c")
    wait_for(lambda: len(numbers(bundle / "rootfs/count")) > 3, "counting")
    port = free_port()
    argv = oci.argv("checkpoint", "--lazy-pages", "--page-server", f"127.0.0.1:{port}", "--image-path", tmp_path / "images", "c")
    source = subprocess.Popen(argv, stdin=null, stdout=null, stderr=null)

    def listening() -> str:
        return subprocess.run(["ss", "-Hltn", f"sport = {port}"], capture_output=True, text=True, check=True).stdout

    wait_for(listening, "the page server", 20)
    assert f"127.0.0.1:{port}" in listening(), listening()
    source.kill()
    source.wait()
    wait_for(lambda: not listening(), "the end of the page server")
    assert oci.status("c") == "paused"
    oci.ok("resume", "c")
    at = len(numbers(bundle / "rootfs/count"))
    wait_for(lambda: len(numbers(bundle / "rootfs/count")) > at, "counting")
    assert_gapless(numbers(bundle / "rootfs/count"))


@pytest.mark.parametrize("method", ["iptables", "nftables", "skip"])
def test_network_lock(oci: Oci, bundles: BundleMaker, network: Network, tmp_path: Path, method: str) -> None:
    server = Server(oci, bundles, network, ["/usr/bin/python3", "-c", ECHO], None)
    server.start(8000)
    client = Client.tcp(network, 8000)
    assert client.ask("before") == repr(b"before\n")
    flags = ("--tcp-established", "--network-lock", method, "--image-path", tmp_path / "images")
    oci.ok("checkpoint", *flags, "c")
    restored(oci, server.bundle, tmp_path / "images", "--tcp-established")
    assert client.ask("after") == repr(b"after\n")
    assert "CRIU" not in network.rules()
    client.close()


def test_empty_network_namespace(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """What was in the network namespace is left out: whoever sets it up again does so at the restore."""
    bundle = bundles(*counter())
    oci.detached(bundle, "c")
    wait_for(lambda: len(numbers(bundle / "rootfs/count")) > 3, "counting")
    oci.ok("checkpoint", "--empty-ns", "network", "--image-path", tmp_path / "images", "c")
    assert not list((tmp_path / "images").glob("netdev-*.img"))
    restored(oci, bundle, tmp_path / "images", "--empty-ns", "network")
    at = len(numbers(bundle / "rootfs/count"))
    wait_for(lambda: len(numbers(bundle / "rootfs/count")) > at, "counting")
    assert_gapless(numbers(bundle / "rootfs/count"))
    assert "lo" in oci.ok("exec", "c", "cat", "/proc/net/dev")


def test_auto_dedup(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """A restore frees the memory's images as it goes: what is in the processes need not be twice in a tmpfs."""
    memory = Memory(oci, bundles, 16)
    place = tmp_path / "tmpfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    try:
        oci.ok("checkpoint", "--image-path", place / "images", "c")
        used = sum(p.stat().st_blocks for p in (place / "images").glob("pages-*.img"))
        assert used * 512 > 16 << 20
        restored(oci, memory.bundle, place / "images", "--auto-dedup")
        assert sum(p.stat().st_blocks for p in (place / "images").glob("pages-*.img")) < used // 4
        memory.ask()
    finally:
        oci.ok("delete", "--force", "c")
        subprocess.run(["umount", place], check=True)


def test_preserved_descriptors(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """A pipe that the container got from its caller at first, and gets from its next caller at a restore."""
    script = "i=0; while :; do i=$((i+1)); echo $i >&3; sleep 0.02; done"
    bundle = bundles("sh", "-c", script)
    r, w = os.pipe()
    assert w != 3
    inherit = ["bash", "-c", f'exec "$@" 3>&{w}', "bash"]
    argv = oci.argv("run", "--detach", "--preserve-fds", "1", "--bundle", bundle, "c")
    subprocess.run([*inherit, *argv], pass_fds=(w,), stdin=null, stdout=null, stderr=null, check=True)
    os.close(w)
    with os.fdopen(r) as first:
        assert [int(first.readline()) for _ in range(3)] == [1, 2, 3]
        oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
        rest = [int(line) for line in first]
    last = rest[-1] if rest else 3
    r, w = os.pipe()
    inherit = ["bash", "-c", f'exec "$@" 3>&{w}', "bash"]
    argv = oci.argv("restore", "--detach", "--preserve-fds", "1", "--image-path", tmp_path / "images", "--bundle", bundle, "c")
    done = subprocess.run([*inherit, *argv], pass_fds=(w,), stdin=null, stdout=null, stderr=null, check=False)
    assert done.returncode == 0, (tmp_path / "images/restore.log").read_text()
    os.close(w)
    with os.fdopen(r) as second:
        found = [int(second.readline()) for _ in range(3)]
    assert found[0] in (last, last + 1) and found[2] == found[0] + 2, (last, found)


def test_shell_job(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """A terminal of the caller's: the restored container has its next caller's."""
    bundle = bundles("sh", "-c", "while read x; do echo got $x; done")
    master, slave = pty.openpty()
    run = oci.argv("run", "--detach", "--bundle", bundle, "c")
    subprocess.run(["setsid", "--ctty", "--wait", *run], stdin=slave, stdout=slave, stderr=slave, check=True)
    oci.ok("checkpoint", "--shell-job", "--image-path", tmp_path / "images", "c")
    os.close(master)
    os.close(slave)
    master, slave = pty.openpty()
    argv = oci.argv("restore", "--detach", "--shell-job", "--image-path", tmp_path / "images", "--bundle", bundle, "c")
    done = subprocess.run(["setsid", "--ctty", "--wait", *argv], stdin=slave, stdout=slave, stderr=slave, check=False)
    assert done.returncode == 0, (tmp_path / "images/restore.log").read_text()
    os.write(master, b"again\n")
    data, deadline = b"", time.monotonic() + 10
    while b"got again" not in data and time.monotonic() < deadline:
        data += os.read(master, 1000)
    assert b"got again" in data
    oci.ok("delete", "--force", "c")
    os.close(master)
    os.close(slave)


def test_skip_file_rwx_check(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    parked = Parked(oci, bundles, Scenario("file", "f = open('/file', 'w'); park(); f.write('x')"))
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    (parked.rootfs / "file").chmod(0o600)
    done = oci.run("restore", "--detach", "--image-path", tmp_path / "images", "--bundle", parked.bundle, "c")
    assert done.returncode == 1 and "has bad mode" in done.stderr and "[file-mismatch]" in done.stderr
    restored(oci, parked.bundle, tmp_path / "images", "--skip-file-rwx-check")
    parked.looks()


def test_a_security_profile_that_this_host_has_not(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles("sleep", "100")
    oci.detached(bundle, "c")
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    argv = ("restore", "--detach", "--image-path", tmp_path / "images", "--bundle", bundle, "--lsm-profile")
    done = oci.run(*argv, "apparmor:nothing", "c")
    assert done.returncode == 1 and "[lsm]" in done.stderr, done.stderr
    assert "does not exist" in oci.run("state", "c").stderr


def test_options_that_contradict(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    oci.detached(bundles("sleep", "100"), "c")
    for options, words in (
        (("--status-fd", "1"), "--status-fd needs --lazy-pages"),
        (("--lazy-pages",), "--lazy-pages needs --page-server"),
        (("--pre-dump", "--hold"), "--pre-dump goes with neither"),
        (("--hold", "--leave-running"), "--hold goes with neither"),
        (("--page-server", "nowhere"), "is not ADDRESS:PORT"),
        (("--cpu-cap", "wings"), "is none of"),
        (("--ghost-limit", "much"), "is no size"),
        (("--sign-key", "/k"), "need --export"),
        (("--control-fd", "9"), "need --hold"),
    ):
        done = oci.run("checkpoint", "--image-path", tmp_path / "images", *options, "c")
        assert done.returncode == 1 and words in done.stderr, done.stderr
    assert oci.status("c") == "running"
    assert images.stats(tmp_path / "images", "dump") == {}
