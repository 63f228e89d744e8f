"""A root that is an overlay: layers are sent once, whiteouts stay whiteouts, and what is written meanwhile follows."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_move import BUNDLE, NAME
from tests.helpers.bed import NO_REMAINS, Bed
from tests.helpers.bundle import BundleMaker, assert_gapless, numbers
from tests.helpers.oci import wait_for
from tests.helpers.stopped import Stopped

LAYERS, STORE = "/var/lib/images", "/var/lib/ferry/layers"
UPPER = f"{BUNDLE}.overlay/upper"
ROOT = f"{BUNDLE}/rootfs"
# It removes what a layer has, replaces a directory of it by one of its own, renames, and appends to one of its files.
COUNT = """
    rm /etc/gone; rm -r /replaced; mkdir /replaced; echo new >/replaced/new; mv /renamed /moved; chmod 600 /etc/mode
    i=0; while :; do i=$((i+1)); echo $i >>/data/count; sleep 0.02; done
"""
# The same is written through a shared mapping, of which the kernel tells nobody.
MAPPED = """
import mmap, os, time
f = open('/data/mapped', 'r+b'); m = mmap.mmap(f.fileno(), 1 << 20); f.close()
n = 0
while True:
    n += 1; m[0:8] = n.to_bytes(8, 'little'); m[1 << 19:(1 << 19) + 8] = n.to_bytes(8, 'little'); time.sleep(0.001)
"""


def mount(bed: Bed, host: str, own: str) -> None:
    """Mount the root of a bundle: two layers that are only read, and one of its own in the directory `own`."""
    lower = f"lowerdir={LAYERS}/top:{LAYERS}/base,upperdir={own}/upper,workdir={own}/work"
    bed.ok(host, "sh", "-ec", f"mkdir -p {own}/upper {own}/work {ROOT}; mount -t overlay -o {lower} overlay {ROOT}")


def start(bed: Bed, own: str, argv: tuple[str, ...], change: Any = None) -> None:
    path = bed.path("host1", BUNDLE)
    base, top = (bed.path("host1", f"{LAYERS}/{name}") for name in ("base", "top"))
    BundleMaker(path.parent)(*argv, path=path, change=change)
    base.parent.mkdir(parents=True, exist_ok=True)
    (path / "rootfs").rename(base)
    for directory in ("etc", "replaced/below", "data", "hidden", "usr", "lib", "lib64"):
        (base / directory).mkdir(parents=True, exist_ok=True)
    for name in ("etc/gone", "etc/mode", "replaced/old", "renamed", "hidden/file", "etc/under"):
        (base / name).write_text(name)
    (base / "etc/linked").hardlink_to(base / "etc/mode")
    (base / "etc/large").write_bytes(os.urandom(3 << 20))
    (base / "data/mapped").write_bytes(bytes(1 << 20))
    (top / "etc").mkdir(parents=True)
    (top / "hidden").mkdir()
    os.setxattr(top / "hidden", "trusted.overlay.opaque", b"y")
    os.mknod(top / "etc/under", stat.S_IFCHR, os.makedev(0, 0))
    (top / "etc/top").write_text("of the upper one of both")
    mount(bed, "host1", own)
    bed.start("host1", BUNDLE, NAME)


@pytest.fixture
def clean(bed: Bed) -> Iterator[Bed]:
    yield bed
    for host in ("host1", "host2"):
        bed.run(host, "sh", "-c", f"runtime delete --force {NAME}; umount {ROOT}; rm -rf {LAYERS} {STORE} {BUNDLE}.overlay")


@pytest.fixture
def counting(clean: Bed) -> Bed:
    start(clean, f"{BUNDLE}.overlay", ("sh", "-c", COUNT))
    wait_for(lambda: len(numbers(data(clean, "host1") / "count")) > 3, "counting")
    return clean


def data(bed: Bed, host: str) -> Path:
    return bed.path(host, f"{UPPER}/data")


def look(bed: Bed, host: str) -> str:
    """Return all that a program inside sees of the root, but for what changes all the time."""
    script = "find / -xdev ! -path '/data*' ! -path /proc | sort | while read f; do stat -c '%n %f %u %g %h' $f; done; cat /etc/* /replaced/* /moved | md5sum"
    return bed.ok(host, "runtime", "exec", NAME, "sh", "-c", script)


def counts(bed: Bed, host: str, other: str) -> None:
    """Its only copy runs there, and nothing of it is on the other host but layers."""
    assert (bed.status(host, NAME), bed.status(other, NAME)) == ("running", None)
    at = len(numbers(data(bed, host) / "count"))
    wait_for(lambda: len(numbers(data(bed, host) / "count")) > at + 3, f"counting on {host}")
    assert_gapless(numbers(data(bed, host) / "count"))
    assert ROOT in bed.inventory(host)["MOUNTS"] and ROOT not in bed.inventory(other)["MOUNTS"]
    for left in (BUNDLE, f"{BUNDLE}.overlay"):
        assert not bed.path(other, left).exists(), f"{left} is left on {other}"


def stored(bed: Bed, host: str) -> list[str]:
    return sorted(n for n in os.listdir(bed.path(host, STORE)) if n[0] != ".") if bed.path(host, STORE).exists() else []


def test_layers_are_sent_once(counting: Bed) -> None:
    bed = counting
    before = look(bed, "host1")
    assert (
        "/hidden/file" not in before
        and "/etc/under" not in before
        and "/etc/gone" not in before
        and "/replaced/old" not in before
    )
    report = bed.move("host1", NAME, "host2")
    assert next(f["words"] for f in report["findings"] if f["code"] == "overlay").endswith("host2 has 0, 2 are sent")
    assert report["details"]["precopy"]["layers"]["count"] == 2
    counts(bed, "host2", "host1")
    assert look(bed, "host2") == before
    kept = stored(bed, "host2")
    assert len(kept) == 2 and bed.path("host1", LAYERS).exists(), "the layers of an image are its owner's"

    bed.move("host2", NAME, "host1")
    counts(bed, "host1", "host2")
    assert look(bed, "host1") == before and stored(bed, "host1") == kept == stored(bed, "host2")
    assert sorted(os.listdir(bed.path("host2", STORE))) == kept, "it is noted as a container's that has left"

    report = bed.move("host1", NAME, "host2", "--pre-copy", "never")
    assert next(f["words"] for f in report["findings"] if f["code"] == "overlay").endswith("host2 has 2, 0 are sent")
    assert "layers" not in report["details"]["precopy"] and report["wire_bytes"] < 3 << 20
    counts(bed, "host2", "host1")
    assert look(bed, "host2") == before

    assert [row["used"] for row in json.loads(bed.ok("host2", "migrate", "layers", "--prune", "--json"))["layers"]] == [
        True,
        True,
    ]
    assert stored(bed, "host2") == kept
    assert "removed" in bed.ok("host2", "migrate", "layers", "--prune", "--from", "host1") and stored(bed, "host1") == []


def test_its_own_layer_in_the_bundle(clean: Bed) -> None:
    """And what is written through a shared mapping comes along."""
    bed = clean

    def change(config: dict[str, Any]) -> None:
        for directory in ("/usr", "/lib", "/lib64"):
            if Path(directory).exists():
                config["mounts"].append(
                    {"destination": directory, "type": "bind", "source": directory, "options": ["rbind", "ro"]}
                )

    start(bed, BUNDLE, ("/usr/bin/python3", "-c", MAPPED), change)

    def value(file: Path, at: int = 0) -> int:
        return int.from_bytes(file.read_bytes()[at : at + 8], "little")

    here, there = bed.path("host1", f"{BUNDLE}/upper/data/mapped"), data(bed, "host2") / "mapped"
    wait_for(lambda: here.exists() and value(here) > 3, "the mapping")
    move = Stopped(bed, "host1", "restore.result:after", "migrate", "move", "--json", NAME, "host2")
    assert value(there) == value(here) and value(there, 1 << 19) in (value(there), value(there) - 1)
    assert move.go_on()[0] == 0
    at = value(there)
    wait_for(lambda: value(there) > at, "the mapping on host2")
    assert not bed.path("host1", BUNDLE).exists() and ROOT not in bed.inventory("host1")["MOUNTS"]


@pytest.mark.parametrize("place", ["prepare.result:after", "restore.result:after"])
def test_an_undone_move_leaves_no_layer(counting: Bed, place: str) -> None:
    bed = counting
    before = bed.inventory("host2")
    move = Stopped(bed, "host1", place, "migrate", "move", "--json", NAME, "host2")
    move.signal(signal.SIGINT)
    assert move.go_on()[0] == 4
    counts(bed, "host1", "host2")
    assert stored(bed, "host2") == []
    after = bed.inventory("host2")
    assert after["MOUNTS"] == before["MOUNTS"]
    assert set(after["FILES"]) - set(before["FILES"]) - NO_REMAINS - {"/run/mount"} == set()  # which mount(8) keeps


@pytest.mark.parametrize(
    "place", ["precopy.result:after", "restore.result:after", "commit.decided:after", "commit.released:after"]
)
def test_its_coordinator_is_killed(counting: Bed, place: str) -> None:
    bed = counting
    move = Stopped(bed, "host1", place, "migrate", "move", "--json", NAME, "host2")
    move.signal(signal.SIGKILL)
    move.go_on()
    bed.run("host1", "migrate", "recover")
    here, there = ("host2", "host1") if place.startswith("commit") else ("host1", "host2")
    counts(bed, here, there)


def test_a_layer_that_came_as_another_one_is_not_kept(counting: Bed) -> None:
    """Somebody changes a layer of an image between the look at it and the copy."""
    bed = counting
    move = Stopped(bed, "host1", "prepare.result:after", "migrate", "move", "--json", NAME, "host2")
    (bed.path("host1", f"{LAYERS}/top") / "etc/top").write_text("changed")
    status, out, _ = move.go_on()
    assert status == 4 and "a layer has come as another one" in json.loads(out)["error"]["message"]
    assert bed.status("host1", NAME) == "running" and stored(bed, "host2") == []


def test_an_overlay_that_cannot_be_made_elsewhere(clean: Bed) -> None:
    bed = clean
    start(bed, f"{BUNDLE}.overlay", ("sh", "-c", COUNT))
    bed.ok("host1", "runtime", "delete", "--force", NAME)
    bed.ok("host1", "umount", ROOT)
    bed.ok("host1", "mount", "-t", "overlay", "-o", f"lowerdir={LAYERS}/top:{LAYERS}/base", "overlay", ROOT)
    bed.start("host1", BUNDLE, NAME)
    done = bed.run("host1", "migrate", "check", "--json", NAME, "host2")
    assert done.returncode == 3
    told = {f["code"]: f["words"] for f in json.loads(done.stdout)["findings"]}
    assert "no layer of its own" in told["overlay-unsupported"]


def test_an_overlay_that_is_mounted_twice(counting: Bed) -> None:
    """Its upper layer is not the container's alone."""
    bed = counting
    bed.ok("host1", "sh", "-ec", f"mkdir -p {LAYERS}/other; mount --bind {ROOT} {LAYERS}/other")
    try:
        done = bed.run("host1", "migrate", "move", "--json", NAME, "host2")
    finally:
        bed.ok("host1", "umount", f"{LAYERS}/other")
    assert done.returncode == 3 and f"another mount, at {LAYERS}/other" in done.stdout


def test_attributes_that_go_between_two_looks(counting: Bed) -> None:
    """A directory that is renamed, and another one made in its place, is not what it was."""
    bed = counting
    bed.ok("host1", "runtime", "exec", NAME, "sh", "-c", "mkdir /opaque; rm -r /hidden; mkdir /hidden; touch /hidden/own")
    move = Stopped(bed, "host1", "precopy.pass:after", "migrate", "move", "--json", "--pre-copy", "always", NAME, "host2")
    bed.ok("host1", "runtime", "exec", NAME, "sh", "-c", "mv /hidden /opaque/; mkdir /hidden")
    assert move.go_on()[0] == 0
    assert bed.ok("host2", "runtime", "exec", NAME, "ls", "-R", "/opaque", "/hidden").split() == [
        "/hidden:",
        "/opaque:",
        "hidden",
        "/opaque/hidden:",
        "own",
    ]


def test_layers_are_a_containers_while_nothing_is_mounted(counting: Bed) -> None:
    """After a reboot nobody has mounted them yet."""
    bed = counting
    bed.move("host1", NAME, "host2")
    kept = stored(bed, "host2")
    bed.ok("host2", "runtime", "delete", "--force", NAME)
    bed.ok("host2", "umount", ROOT)
    bed.ok("host2", "migrate", "layers", "--prune")
    assert stored(bed, "host2") == kept
    bed.ok("host2", "rm", "-r", BUNDLE, f"{BUNDLE}.overlay")
    bed.ok("host2", "migrate", "layers", "--prune")
    assert stored(bed, "host2") == []
