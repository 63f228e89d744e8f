"""containerd's `ctr run` with its runc shim and the runtime under test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import make_rootfs
from tests.helpers.leaks import Snapshot
from tests.helpers.oci import OURS, wait_for

CONFIG = """version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.overlayfs"]
[grpc]
  address = "{0}/c.sock"
[ttrpc]
  address = "{0}/t.sock"
"""


class Containerd:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "config.toml").write_text(CONFIG.format(directory))
        with (directory / "log").open("w") as log:
            self.daemon = subprocess.Popen(["containerd", "--config", directory / "config.toml"], stdout=log, stderr=log)
        runtime = os.environ.get("RUNTIME") or OURS
        self.runtime = shutil.which(runtime) or runtime

    def ctr(self, *args: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        argv = ["ctr", "--address", str(self.directory / "c.sock"), "--timeout", "30s", *map(str, args)]
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, **kwargs}
        return subprocess.run(argv, text=True, timeout=60, check=False, **options)

    def ok(self, *args: str | Path, **kwargs: Any) -> str:
        done = self.ctr(*args, **kwargs)
        assert done.returncode == 0, f"ctr {args}: {done.returncode}: {done.stderr}"
        return (done.stdout or "").strip()

    def run(
        self, container: str, *command: str, options: tuple[str, ...] = (), **kwargs: Any
    ) -> subprocess.CompletedProcess[str]:
        shim = ("--runtime", "io.containerd.runc.v2", "--runc-binary", self.runtime, "--env", "PATH=/bin")
        return self.ctr("run", *shim, *options, "--rootfs", self.directory / "rootfs", container, *command, **kwargs)


@pytest.fixture(scope="module")
def _containerd() -> Iterator[Containerd]:
    # A unix socket's path has little room: not below pytest's directory.
    directory = Path(f"/tmp/ferry-ctr-{os.getpid()}")
    directory.mkdir()
    make_rootfs(directory / "rootfs")
    containerd = Containerd(directory)
    try:
        wait_for(lambda: containerd.ctr("version").returncode == 0, "the start of containerd", timeout_s=30)
        yield containerd
    finally:
        containerd.daemon.send_signal(signal.SIGTERM)
        containerd.daemon.wait(timeout=20)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def containerd(_containerd: Containerd) -> Iterator[Containerd]:
    before = Snapshot.take()
    yield _containerd
    for name in _containerd.ok("container", "ls", "-q").split():
        _containerd.ctr("task", "kill", "-s", "KILL", name)
        _containerd.ctr("task", "rm", "-f", name)
        _containerd.ctr("container", "rm", name)
    assert [left for left in Snapshot.take().more_than(before) if not left.endswith("/default")] == []


def test_run(containerd: Containerd) -> None:
    done = containerd.run("c", "sh", "-c", "echo out; echo err >&2; exit 7", options=("--rm",))
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_a_command_that_is_not_there(containerd: Containerd) -> None:
    done = containerd.run("c", "nothing", options=("--rm",))
    assert done.returncode != 0 and "not found" in done.stderr


def test_terminal(containerd: Containerd) -> None:
    shim = f"--runtime io.containerd.runc.v2 --runc-binary {containerd.runtime} --env PATH=/bin"
    argv = f"ctr --address {containerd.directory}/c.sock run {shim} --rm -t --rootfs {containerd.directory}/rootfs c tty"
    done = subprocess.run(
        ["script", "-qec", argv, "/dev/null"], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
    )
    assert "/dev/pts/0" in done.stdout, done


def test_life_of_a_task(containerd: Containerd) -> None:
    command = ("sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done")
    done = containerd.run("c", *command, options=("-d", "--memory-limit", str(64 << 20)))
    assert done.returncode == 0, done.stderr

    def status() -> str:
        lines = [line.split() for line in containerd.ok("task", "ls").splitlines()]
        return next(line[2] for line in lines if line[0] == "c")

    assert status() == "RUNNING"
    assert containerd.ok("task", "exec", "--exec-id", "e", "c", "sh", "-c", "echo inside; id -u").split() == ["inside", "0"]
    assert containerd.ctr("task", "exec", "--exec-id", "f", "c", "sh", "-c", "exit 9").returncode == 9
    assert "PID" in containerd.ok("task", "ps", "c")
    assert "memory" in containerd.ok("task", "metrics", "c")
    containerd.ok("task", "pause", "c")
    assert status() == "PAUSED"
    containerd.ok("task", "resume", "c")
    assert status() == "RUNNING"
    containerd.ok("task", "kill", "-s", "TERM", "c")
    wait_for(lambda: status() == "STOPPED", "the end of the task")
    removed = containerd.ctr("task", "rm", "c")
    assert removed.returncode == 3 or "3" in removed.stderr, removed
    containerd.ok("container", "rm", "c")
    time.sleep(0.1)
