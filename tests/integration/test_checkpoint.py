"""Checkpoint and restore on the real CRIU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.bundle import BundleMaker, Config, assert_gapless, counter, numbers
from tests.helpers.oci import Oci, wait_for


def ended(oci: Oci, container: str = "c") -> None:
    """See that a checkpointed container is gone: nothing of it is left to delete."""
    assert "does not exist" in oci.run("state", container).stderr


def _restore(oci: Oci, images: Path, bundle: Path, *options: str, container: str = "c") -> subprocess.CompletedProcess[str]:
    null = subprocess.DEVNULL
    done = oci.run(
        "restore", "--detach", "--image-path", images, "--bundle", bundle, *options, container, stdout=null, stderr=null
    )
    if done.returncode:
        done = oci.run("restore", "--detach", "--image-path", images, "--bundle", bundle, *options, container)
    return done


def test_it_goes_on_where_it_was(oci: Oci, counting: Path, tmp_path: Path) -> None:
    count = counting / "rootfs/count"
    before = oci.ok(
        "exec",
        "c",
        "sh",
        "-c",
        "cat /proc/1/cgroup /proc/1/limits; grep -E 'Cap|NoNew' /proc/1/status; hostname; ls /dev; mount | cut -d' ' -f3 | sort",
    )
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    ended(oci)
    at = numbers(count)
    time.sleep(0.2)
    assert numbers(count) == at, "it ran on after its checkpoint"
    assert _restore(oci, tmp_path / "images", counting).returncode == 0
    assert oci.status("c") == "running"
    wait_for(lambda: len(numbers(count)) > len(at) + 3, "counting after the restore")
    assert_gapless(numbers(count))
    after = oci.ok(
        "exec",
        "c",
        "sh",
        "-c",
        "cat /proc/1/cgroup /proc/1/limits; grep -E 'Cap|NoNew' /proc/1/status; hostname; ls /dev; mount | cut -d' ' -f3 | sort",
    )
    assert after == before


def test_leave_running(oci: Oci, counting: Path, tmp_path: Path) -> None:
    oci.ok("checkpoint", "--leave-running", "--image-path", tmp_path / "images", "c")
    assert oci.status("c") == "running"
    count = counting / "rootfs/count"
    at = len(numbers(count))
    wait_for(lambda: len(numbers(count)) > at + 3, "counting on")
    assert_gapless(numbers(count))


@pytest.mark.ferry
def test_images_in_a_directory_that_others_may_enter(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """They are their owner's alone there, too; a hook that runs afterwards makes its files as ever."""
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"cat >/dev/null; umask >{tmp_path}/umask"]}
    bundle = bundles(*counter(), change=lambda c: c.update(hooks={"poststop": [hook]}))
    oci.detached(bundle, "c")
    (tmp_path / "images").mkdir(mode=0o755)
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    assert not [p for p in (tmp_path / "images").iterdir() if p.stat().st_mode & 0o077]
    assert int((tmp_path / "umask").read_text(), 8) == 0o022


@pytest.mark.ferry
def test_an_image_directory_that_was_used_before(oci: Oci, counting: Path, tmp_path: Path) -> None:
    """As podman does it. What the first dump left of processes that have ended is none of the second's."""
    images = tmp_path / "images"
    oci.ok("checkpoint", "--leave-running", "--image-path", images, "c")
    first = {p.name for p in images.glob("core-*.img")}
    wait_for(lambda: len(numbers(counting / "rootfs/count")) > 20, "another child")
    oci.ok("checkpoint", "--image-path", images, "c")
    assert {p.name for p in images.glob("core-*.img")} != first and len(list(images.glob("core-*.img"))) <= 2
    assert _restore(oci, images, counting).returncode == 0
    at = len(numbers(counting / "rootfs/count"))
    wait_for(lambda: len(numbers(counting / "rootfs/count")) > at, "counting")


@pytest.mark.ferry
def test_restored_twice_from_one_directory_under_another_name(oci: Oci, counting: Path, tmp_path: Path) -> None:
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    ended(oci)
    at = len(numbers(counting / "rootfs/count"))
    for name in ("again", "once-more"):
        assert _restore(oci, tmp_path / "images", counting, container=name).returncode == 0
        wait_for(lambda: len(numbers(counting / "rootfs/count")) > at, "counting")
        oci.ok("delete", "--force", name)


@pytest.mark.ferry
@pytest.mark.parametrize("mode", ["soft", "full", "strict", "ignore"])
def test_manage_cgroups_mode(oci: Oci, counting: Path, tmp_path: Path, mode: str) -> None:
    oci.ok("checkpoint", "--manage-cgroups-mode", mode, "--image-path", tmp_path / "images", "c")
    ended(oci)
    done = _restore(oci, tmp_path / "images", counting, "--manage-cgroups-mode", mode)
    assert done.returncode == 0, done.stderr
    at = len(numbers(counting / "rootfs/count"))
    wait_for(lambda: len(numbers(counting / "rootfs/count")) > at, "counting")
    assert set(json.loads(oci.ok("ps", "--format", "json", "c")))
    assert oci.status("c") == "running"


def test_a_readonly_root(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    def change(c: Config) -> None:
        c["root"]["readonly"] = True
        c["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})

    bundle = bundles(*counter("/tmp/count"), change=change)
    oci.detached(bundle, "c")
    wait_for(lambda: oci.run("exec", "c", "test", "-s", "/tmp/count").returncode == 0, "counting")
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    ended(oci)
    assert _restore(oci, tmp_path / "images", bundle).returncode == 0
    out = oci.ok("exec", "c", "sh", "-c", "sleep 0.2; cat /tmp/count; touch /x 2>&1; true")
    assert "Read-only" in out
    assert_gapless([int(line) for line in out.split() if line.isdigit()])


@pytest.mark.ferry
def test_a_readonly_root_without_tmp(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles("sleep", "100", change=lambda c: c["root"].update(readonly=True))
    (bundle / "rootfs/tmp").rmdir()
    oci.detached(bundle, "c")
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    ended(oci)
    assert _restore(oci, tmp_path / "images", bundle).returncode == 0
    assert oci.status("c") == "running"
    assert not (bundle / "rootfs/tmp").exists()


def test_a_bind_mount(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()

    def change(c: Config) -> None:
        c["mounts"].append({"destination": "/data", "type": "bind", "source": str(tmp_path / "data"), "options": ["rbind"]})

    bundle = bundles(*counter("/data/count"), change=change)
    (bundle / "rootfs/data").mkdir()
    oci.detached(bundle, "c")
    count = tmp_path / "data/count"
    wait_for(lambda: len(numbers(count)) > 3, "counting")
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    ended(oci)
    assert _restore(oci, tmp_path / "images", bundle).returncode == 0
    at = len(numbers(count))
    wait_for(lambda: len(numbers(count)) > at + 3, "counting")
    assert_gapless(numbers(count))


@pytest.mark.ferry
def test_an_open_file_that_was_inherited(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """stdout is a file of the host, which no mount of the container leads to."""
    bundle = bundles("sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
    with (tmp_path / "out").open("w") as out:
        assert oci.run("run", "--detach", "--bundle", bundle, "c", stdout=out, stderr=subprocess.DEVNULL).returncode == 0
    wait_for(lambda: len(numbers(tmp_path / "out")) > 3, "counting")
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    ended(oci)
    with (tmp_path / "out").open("a") as out:
        argv = ("restore", "--detach", "--image-path", tmp_path / "images", "--bundle", bundle, "c")
        assert oci.run(*argv, stdout=out, stderr=subprocess.DEVNULL).returncode == 0
    at = len(numbers(tmp_path / "out"))
    wait_for(lambda: len(numbers(tmp_path / "out")) > at + 3, "counting")
    assert_gapless(numbers(tmp_path / "out"))


@pytest.mark.ferry
def test_a_terminal_comes_back_through_the_console_socket(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    import array

    def receive(listener: socket.socket) -> int:
        connection, _ = listener.accept()
        _, ancillary, _, _ = connection.recvmsg(100, socket.CMSG_LEN(4))
        connection.close()
        return array.array("i", ancillary[0][2])[0]

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "console.sock"))
    listener.listen()
    script = "while read x; do echo got $x; done"
    bundle = bundles("sh", "-c", script, change=lambda c: c["process"].update(terminal=True))
    null = subprocess.DEVNULL
    console = ("--console-socket", str(tmp_path / "console.sock"))
    assert oci.run("run", "--detach", *console, "--bundle", bundle, "c", stdout=null, stderr=null).returncode == 0
    first = receive(listener)
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    os.close(first)
    ended(oci)
    done = _restore(oci, tmp_path / "images", bundle, *console)
    assert done.returncode == 0, done.stderr
    master = receive(listener)
    os.write(master, b"again\n")
    data = b""
    deadline = time.monotonic() + 10
    while b"got again" not in data and time.monotonic() < deadline:
        data += os.read(master, 1000)
    assert b"got again" in data
    os.close(master)
    listener.close()


@pytest.mark.ferry
def test_an_established_connection_needs_the_flag(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles("sh", "-c", "sleep 1000 | nc -l -p 77 & sleep 0.3; sleep 1000 | nc 127.0.0.1 77")
    oci.detached(bundle, "c")
    wait_for(lambda: oci.ok("exec", "c", "cat", "/proc/net/tcp", "/proc/net/tcp6").count(" 01 ") == 2, "a connection")
    done = oci.run("checkpoint", "--image-path", tmp_path / "images", "c")
    assert done.returncode == 1
    assert "Connected TCP socket" in done.stderr and "give --tcp-established" in done.stderr
    assert oci.status("c") == "running", "a refused checkpoint must leave it running"
    oci.ok("checkpoint", "--tcp-established", "--image-path", tmp_path / "images2", "c")
    ended(oci)
    done = _restore(oci, tmp_path / "images2", bundle, "--tcp-established")
    assert done.returncode == 0, done.stderr
    assert oci.ok("exec", "c", "cat", "/proc/net/tcp", "/proc/net/tcp6").count(" 01 ") == 2


@pytest.mark.ferry
def test_a_restore_without_a_checkpoint(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    done = _restore(oci, tmp_path, bundles("true"))
    assert done.returncode == 1 and "inventory.img" in done.stderr
    assert "does not exist" in oci.run("state", "c").stderr


@pytest.mark.ferry
def test_a_damaged_image(oci: Oci, counting: Path, tmp_path: Path) -> None:
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    ended(oci)
    (tmp_path / "images/pstree.img").write_bytes(b"nonsense")
    done = _restore(oci, tmp_path / "images", counting)
    assert done.returncode == 1 and "criu restore failed" in done.stderr and "Error (" in done.stderr
    assert "does not exist" in oci.run("state", "c").stderr


@pytest.mark.ferry
def test_without_criu(oci: Oci, counting: Path, tmp_path: Path) -> None:
    done = oci.run("checkpoint", "--image-path", tmp_path / "images", "c", env={**os.environ, "FERRY_CRIU": "/no/criu"})
    assert done.returncode == 1 and "/no/criu cannot be executed" in done.stderr
    assert oci.status("c") == "running"


@pytest.mark.ferry
def test_images_are_the_owners_alone(oci: Oci, counting: Path, tmp_path: Path) -> None:
    oci.ok("checkpoint", "--leave-running", "--image-path", tmp_path / "images", "c")
    assert (tmp_path / "images").stat().st_mode & 0o777 == 0o700
