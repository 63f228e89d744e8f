"""Lazy restore: memory follows the processes, and a daemon that dies never leaves them with zeros for memory."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.memory import Memory
from tests.helpers.oci import CRIU, Oci, wait_for
from tests.integration.test_hold import Hold

pytestmark = pytest.mark.ferry
null = subprocess.DEVNULL


def daemons(directory: Path) -> list[int]:
    """Return the lazy-pages daemons of an image directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"lazy-pages" in words and words[0] != b"strace" and str(directory).encode() in words:
                found.append(int(entry.name))
    return found


def test_from_local_images(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 64)
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    for name in ("c", "again"):
        oci.ok(
            "restore",
            "--detach",
            "--lazy-pages",
            "--bundle",
            memory.bundle,
            "--image-path",
            images,
            name,
            stdout=null,
            stderr=null,
        )
        memory.ask()
        wait_for(lambda: not daemons(images), "the drain")
        assert oci.status(name) == "running"
        oci.ok("delete", "--force", name)
        memory._asked = 0
        (memory.bundle / "rootfs/answer").write_text("")


def test_in_the_foreground_and_wiped(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 8)
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    argv = oci.argv("restore", "--lazy-pages", "--wipe", "--bundle", memory.bundle, "--image-path", images, "c")
    process = subprocess.Popen(argv, stdin=null, stdout=null, stderr=null)
    memory.ask()
    wait_for(lambda: not images.exists(), "the wiping")
    oci.ok("kill", "c", "KILL")
    assert process.wait(10) == 128 + signal.SIGKILL


def test_wiped_without_lazy_pages(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 4)
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    oci.ok("restore", "--detach", "--wipe", "--bundle", memory.bundle, "--image-path", images, "c", stdout=null, stderr=null)
    assert not images.exists()
    memory.ask()


def held(oci: Oci, memory: Memory, images: Path) -> Hold:
    hold = Hold(oci, "restore", "--detach", "--lazy-pages", "--image-path", images, "--bundle", memory.bundle)
    assert hold.event() == "ready"
    hold.say("go")
    assert hold.event() == "held"
    return hold


def test_held_and_committed(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 16)
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    hold = held(oci, memory, tmp_path / "images")
    hold.say("commit")
    assert [hold.event(), hold.event()] == ["resumed", "done"]
    assert hold.close() == 0
    memory.ask()
    wait_for(lambda: not daemons(tmp_path / "images"), "the drain")


def test_held_and_aborted(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 16)
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    hold = held(oci, memory, tmp_path / "images")
    hold.say("abort")
    assert hold.event() == "aborted"
    assert hold.close() == 3
    wait_for(lambda: not daemons(tmp_path / "images"), "the daemon's end")
    assert "does not exist" in oci.run("state", "c").stderr


@pytest.fixture
def slow_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the daemon take its time over each page, so that a test meets it at work."""
    script = tmp_path / "slow-criu"
    slowly = "strace -qq -D -o /dev/null -e trace=ioctl -e inject=ioctl:delay_enter=50000"
    script.write_text(f'#!/bin/sh\n[ "$1" = lazy-pages ] && exec {slowly} {CRIU} "$@"\nexec {CRIU} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("FERRY_CRIU", str(script))


@pytest.mark.usefixtures("slow_daemon")
def test_a_daemon_that_dies_while_it_is_held(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 16)
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    hold = held(oci, memory, images)
    (daemon,) = daemons(images)
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: not daemons(images), "the daemon's end")
    time.sleep(0.2)
    hold.say("commit")
    assert hold.event() == "error"
    hold.close()
    assert "does not exist" in oci.run("state", "c").stderr
    # The images are whole still.
    oci.ok("restore", "--detach", "--bundle", memory.bundle, "--image-path", images, "c", stdout=null, stderr=null)
    memory.ask()


@pytest.mark.usefixtures("slow_daemon")
def test_a_daemon_that_dies_before_the_drain(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """Without somebody who holds on to its userfaultfds, the program would go on with zeros for memory."""
    memory = Memory(oci, bundles, 64)
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    hold = held(oci, memory, images)
    (daemon,) = daemons(images)
    os.kill(daemon, signal.SIGSTOP)
    answer = (memory.bundle / "rootfs/answer").read_text()
    hold.say("commit")
    assert hold.event() == "resumed"
    (memory.bundle / "rootfs/ask").touch()
    os.kill(daemon, signal.SIGKILL)
    oci.wait_status("c", "stopped")
    assert (memory.bundle / "rootfs/answer").read_text() == answer, "it went on without its memory"
    assert "lazy-pages ended with status -9" in oci.state("c")["annotations"]["ferry.failure"]
    hold.close()


def test_a_daemon_of_the_callers(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """As scripts for runc do it: the daemon is started first, in the same work directory."""
    memory = Memory(oci, bundles, 8)
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    daemon = subprocess.Popen([CRIU, "lazy-pages", "-D", str(images), "-W", str(images)], stdin=null, stdout=null, stderr=null)
    wait_for((images / "lazy-pages.socket").exists, "the daemon")
    oci.ok(
        "restore", "--detach", "--lazy-pages", "--bundle", memory.bundle, "--image-path", images, "c", stdout=null, stderr=null
    )
    memory.ask()
    assert daemon.wait(20) == 0


def test_wiping_leaves_a_daemon_of_the_callers_its_images(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 8)
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    slowly = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=ioctl", "-e", "inject=ioctl:delay_enter=2000"]
    argv = [*slowly, CRIU, "lazy-pages", "-D", str(images), "-W", str(images)]
    daemon = subprocess.Popen(argv, stdin=null, stdout=null, stderr=null)
    wait_for((images / "lazy-pages.socket").exists, "the daemon")
    options = ("--lazy-pages", "--wipe", "--bundle", memory.bundle, "--image-path", images)
    oci.ok("restore", "--detach", *options, "c", stdout=null, stderr=null)
    memory.ask()
    assert daemon.wait(60) == 0
    assert (images / "inventory.img").exists()


def test_an_aborted_hold_leaves_the_images(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 4)
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    hold = Hold(oci, "restore", "--detach", "--lazy-pages", "--wipe", "--image-path", images, "--bundle", memory.bundle)
    assert hold.event() == "ready"
    hold.say("go")
    assert hold.event() == "held"
    wait_for(lambda: not daemons(images), "the drain")
    hold.say("abort")
    assert hold.event() == "aborted"
    hold.close()
    time.sleep(0.2)
    oci.ok("restore", "--detach", "--bundle", memory.bundle, "--image-path", images, "c", stdout=null, stderr=null)
    memory.ask()


def test_images_that_are_damaged(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 4)
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    (images / "pstree.img").write_bytes(b"nonsense")
    done = oci.run("restore", "--detach", "--lazy-pages", "--bundle", memory.bundle, "--image-path", images, "c")
    assert done.returncode == 1 and "criu lazy-pages ended with status" in done.stderr
    assert "does not exist" in oci.run("state", "c").stderr


@pytest.mark.usefixtures("slow_daemon")
def test_a_checkpoint_waits_for_the_drain(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """What is still to come would be missing in its images, and nobody would notice."""
    memory = Memory(oci, bundles, 8)
    first, second = tmp_path / "first", tmp_path / "second"
    oci.ok("checkpoint", "--image-path", first, "c")
    argv = ("restore", "--detach", "--lazy-pages", "--bundle", memory.bundle, "--image-path", first, "c")
    oci.ok(*argv, stdout=null, stderr=null)
    assert daemons(first), "the drain is over already"
    oci.ok("checkpoint", "--image-path", second, "c")
    assert not daemons(first)
    oci.ok("restore", "--detach", "--bundle", memory.bundle, "--image-path", second, "c", stdout=null, stderr=null)
    memory.ask()
