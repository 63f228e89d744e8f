"""Images and hosts that do not fit: a restore says what is wrong and leaves nothing; a checkpoint that fails changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker, Config, counter, numbers
from tests.helpers.cpu import of_everything
from tests.helpers.memory import Memory
from tests.helpers.oci import Oci, counts_on, wait_for
from tests.helpers.scenario import Parked, Scenario
from tests.helpers.served import Client, Network, Server
from tests.integration.test_hold import Hold

pytestmark = pytest.mark.ferry
null = subprocess.DEVNULL
ECHO = "import socket\ns = socket.create_server(('0.0.0.0', 8000)); c, _ = s.accept()\nwhile d := c.recv(9999): c.sendall(d)"


def restored(oci: Oci, bundle: Path, images: Path, *options: str | Path) -> None:
    argv = ("restore", "--detach", "--image-path", images, "--bundle", bundle, *options, "c")
    oci.ok(*argv, stdout=null, stderr=null)


def refused(oci: Oci, bundle: Path, images: Path, *options: str | Path) -> str:
    done = oci.run("restore", "--detach", "--image-path", images, "--bundle", bundle, *options, "c")
    assert done.returncode == 1, "it was not refused"
    assert "does not exist" in oci.run("state", "c").stderr
    return done.stderr


def change(path: Path, kind: str, edit: Callable[[Any], Any]) -> None:
    """Edit the first entry of an image. Source: CRIU's criu/protobuf.c: a length before each entry."""
    import importlib

    module = importlib.import_module(f"pycriu.images.{kind}_pb2")
    data = path.read_bytes()
    at = 4 if kind == "inventory" else 8  # its magic alone; others have the version's before
    (length,) = struct.unpack_from("<I", data, at)
    entry = getattr(module, f"{kind}_entry").FromString(data[at + 4 : at + 4 + length])
    edit(entry)
    raw = entry.SerializeToString()
    path.write_bytes(data[:at] + struct.pack("<I", len(raw)) + raw + data[at + 4 + length :])


def test_images_that_are_not_there(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles("true")
    assert f"no checkpoint in {tmp_path}/none" in refused(oci, bundle, tmp_path / "none")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(oci, bundle, tmp_path / "file")


def test_images_that_are_cut_short(oci: Oci, counting: Path, tmp_path: Path) -> None:
    """Each image in turn: what CRIU needs of it is missed, and nothing of the container is left."""
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    (images / "dump.log").unlink()
    # Of a tmpfs each is like the others.
    names = [p.name for p in sorted(images.glob("*.img")) if p.stat().st_size > 12 and not p.name.startswith("tmpfs")]
    needed = {
        "core-1.img",
        "files.img",
        "fdinfo-2.img",
        "inventory.img",
        "mm-1.img",
        "pagemap-1.img",
        "pages-1.img",
        "pstree.img",
    }
    assert needed <= set(names)
    passed = set()
    for name in names:
        broken = tmp_path / "broken"
        shutil.copytree(images, broken)
        with (broken / name).open("r+b") as f:
            f.truncate((broken / name).stat().st_size // 2)
        with (tmp_path / "said").open("w") as said:
            done = oci.run("restore", "--detach", "--image-path", broken, "--bundle", counting, "c", stdout=null, stderr=said)
        if done.returncode:
            assert "does not exist" in oci.run("state", "c").stderr
            words = (tmp_path / "said").read_text()
            assert "[images-damaged]" in words or "cut short" in words or name == "rule-10.img", words
        else:
            passed.add(name)
            oci.ok("delete", "--force", "c")
        shutil.rmtree(broken)
    assert not passed & needed, f"restored although cut short: {passed & needed}"
    restored(oci, counting, images)


def test_from_another_cpu(oci: Oci, counting: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    cpu = images / "cpuinfo.img"
    whole = cpu.read_bytes()
    cpu.write_bytes(of_everything(whole))
    assert "[cpu]" in refused(oci, counting, images)
    restored(oci, counting, images, "--cpu-cap", "none")  # at the program's own risk
    counts_on(counting / "rootfs/count")


def test_from_another_architecture(oci: Oci, counting: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    change(images / "core-1.img", "core", lambda e: setattr(e, "mtype", 3))
    assert "[architecture]" in refused(oci, counting, images)


def test_from_a_newer_criu(oci: Oci, counting: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    change(images / "inventory.img", "inventory", lambda e: setattr(e, "img_version", 99))
    assert "[criu-version]" in refused(oci, counting, images)


def test_an_open_file_that_is_gone_or_changed(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    parked = Parked(
        oci,
        bundles,
        Scenario(
            "file", "f = open('/file', 'w+'); f.write('content'); f.flush(); park(); f.seek(0); assert f.read() == 'content'"
        ),
    )
    images = tmp_path / "images"
    oci.ok("checkpoint", "--image-path", images, "c")
    file = parked.rootfs / "file"
    file.rename(tmp_path / "elsewhere")
    words = refused(oci, parked.bundle, images)
    assert ("[file-mismatch]" in words and "/file" in words) or "file" in words
    file.write_text("longer than before")
    words = refused(oci, parked.bundle, images)
    assert "has bad size 18 (expect 7)" in words and "[file-mismatch]" in words
    (tmp_path / "elsewhere").rename(file)
    parked.restore(images)
    parked.looks()


def test_a_mount_that_is_not_there(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()

    def with_data(c: Config) -> None:
        c["mounts"].append({"destination": "/data", "type": "bind", "source": str(tmp_path / "data"), "options": ["bind"]})

    bundle = bundles(*counter("/data/count"), change=with_data)
    oci.detached(bundle, "c")
    wait_for(lambda: len(numbers(tmp_path / "data/count")) > 3, "counting")
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    (tmp_path / "data").rename(tmp_path / "other")
    words = refused(oci, bundle, tmp_path / "images")
    assert f"not on this host: {tmp_path}/data (mounted at /data)" in words
    (tmp_path / "other").rename(tmp_path / "data")
    restored(oci, bundle, tmp_path / "images")
    counts_on(tmp_path / "data/count")


def test_a_process_number_that_is_taken(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    def on_host(c: Config) -> None:
        c["linux"]["namespaces"] = [n for n in c["linux"]["namespaces"] if n["type"] != "pid"]
        c["linux"]["maskedPaths"] = c["linux"]["readonlyPaths"] = []

    bundle = bundles("sleep", "100", change=on_host)
    oci.detached(bundle, "c")
    oci.ok("checkpoint", "--leave-running", "--image-path", tmp_path / "images", "c")
    done = oci.run("restore", "--detach", "--image-path", tmp_path / "images", "--bundle", bundle, "d")
    assert done.returncode == 1 and "[pid-taken]" in done.stderr
    assert oci.status("c") == "running"
    assert "does not exist" in oci.run("state", "d").stderr


def test_without_permission(oci: Oci, counting: Path, tmp_path: Path) -> None:
    oci.ok("checkpoint", "--leave-running", "--image-path", tmp_path / "images", "c")
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    argv = oci.argv("checkpoint", "--image-path", tmp_path / "more", "c")
    done = subprocess.run([*as_nobody, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ermission denied" in done.stderr
    assert oci.status("c") == "running"


class Held:
    """A server whose checkpoint is held, its connection in repair mode and locked, and its client."""

    def __init__(self, oci: Oci, bundles: BundleMaker, network: Network, images: Path) -> None:
        server = Server(oci, bundles, network, ["/usr/bin/python3", "-c", ECHO], None)
        server.start(8000)
        self.network, self.client = network, Client.tcp(network, 8000)
        assert self.client.ask("before") == repr(b"before\n")
        self.hold = Hold(oci, "checkpoint", "--tcp-established", "--image-path", images)
        assert self.hold.event() == "ready"
        self.hold.say("go")
        assert [self.hold.event(), self.hold.event()] == ["frozen", "held"]
        assert "CRIU" in network.rules()

    def kill_criu(self) -> None:
        pid = self.hold.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    def is_answered(self) -> None:
        assert self.network.rules() == ""
        assert self.client.ask("after") == repr(b"after\n")
        self.client.close()


def test_criu_is_killed_in_the_middle(oci: Oci, bundles: BundleMaker, network: Network, tmp_path: Path) -> None:
    """It can undo nothing any more: the rules by which it keeps packets out are swept, and the client is answered."""
    held = Held(oci, bundles, network, tmp_path / "images")
    held.kill_criu()
    held.hold.say("abort")
    assert held.hold.event() in ("aborted", "error")
    held.hold.close()
    assert oci.status("c") == "running"
    held.is_answered()


def test_criu_is_killed_while_it_writes_memory(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 256)
    images = tmp_path / "images"
    verb = subprocess.Popen(
        oci.argv("checkpoint", "--image-path", images, "c"), stdin=null, stdout=null, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: any(p.stat().st_size for p in images.glob("pages-*.img")), "memory in the images")
    children = Path(f"/proc/{verb.pid}/task/{verb.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, words = verb.communicate(timeout=30)
    assert verb.returncode == 1 and "criu ended with status -9" in words
    assert oci.status("c") == "running"
    memory.ask()


def test_verb_and_criu_are_killed_in_the_middle(oci: Oci, bundles: BundleMaker, network: Network, tmp_path: Path) -> None:
    """Nobody is there to undo anything: the container is paused, and `resume` sweeps what was left."""
    held = Held(oci, bundles, network, tmp_path / "images")
    held.kill_criu()
    held.hold.process.kill()
    held.hold.close()
    assert oci.status("c") == "paused" and "CRIU" in network.rules()
    oci.ok("resume", "c")
    held.is_answered()


def test_locks_of_others_stay(oci: Oci, bundles: BundleMaker, network: Network, tmp_path: Path) -> None:
    """In a network namespace that is shared, as a pod's, there may be another dump."""
    inside = ["nsenter", f"--net=/run/netns/{network.server}", "nft"]
    subprocess.run([*inside, "add", "table", "inet", "CRIU-others"], check=True)
    held = Held(oci, bundles, network, tmp_path / "images")
    held.kill_criu()
    held.hold.say("abort")
    held.hold.close()
    assert network.rules().split() == ["table", "inet", "CRIU-others", "{", "}"]
    subprocess.run([*inside, "delete", "table", "inet", "CRIU-others"], check=True)
    held.is_answered()
