"""What is bind-mounted into a container: copied along, shared, or a reason not to move it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_move import BUNDLE, NAME
from tests.helpers.bed import Bed
from tests.helpers.bundle import BundleMaker, assert_gapless, numbers
from tests.helpers.oci import wait_for
from tests.helpers.stopped import Stopped

DATA = "/var/lib/of/the/data"
COUNT = "i=0; while :; do i=$((i+1)); echo $i >>/data/count; sleep 0.02; done"


def start(bed: Bed, source: str) -> None:
    path = bed.path("host1", BUNDLE)
    path.parent.mkdir(parents=True, exist_ok=True)

    def change(config: dict[str, Any]) -> None:
        config["mounts"].append({"destination": "/data", "type": "bind", "source": source, "options": ["rbind", "rw"]})

    BundleMaker(path.parent)("sh", "-c", COUNT, path=path, change=change)
    (path / "rootfs/data").mkdir()
    bed.start("host1", BUNDLE, NAME)


def data(bed: Bed, host: str) -> Path:
    return bed.path(host, DATA)


@pytest.fixture
def counting(bed: Bed) -> Iterator[Bed]:
    """A bed with a container on host1 that counts in a volume."""
    directory = data(bed, "host1")
    directory.mkdir(parents=True)
    (directory / "large").write_bytes(bytes(range(256)) * 8192)
    (directory / "other").hardlink_to(directory / "large")
    directory.chmod(0o2750)
    start(bed, DATA)
    wait_for(lambda: len(numbers(directory / "count")) > 3, "counting")
    yield bed
    bed.clean()
    for host in ("host1", "host2"):
        bed.run(host, "rm", "-rf", "/var/lib/of")


def counts(bed: Bed, host: str, other: str) -> None:
    """Its only copy is there, with all of its volume."""
    directory = data(bed, host)
    assert (bed.status(host, NAME), bed.status(other, NAME)) == ("running", None)
    at = len(numbers(directory / "count"))
    wait_for(lambda: len(numbers(directory / "count")) > at + 3, f"counting on {host}")
    assert_gapless(numbers(directory / "count"))
    assert (directory / "large").read_bytes() == bytes(range(256)) * 8192
    assert (directory / "large").samefile(directory / "other") and directory.stat().st_mode & 0o7777 == 0o2750
    assert not bed.path(other, BUNDLE).exists() and not data(bed, other).exists()


def findings(bed: Bed, *options: str) -> set[str]:
    done = bed.run("host1", "migrate", "check", "--json", *options, NAME, "host2")
    assert done.returncode == 3, done.stdout
    return {f["code"] for f in json.loads(done.stdout)["findings"] if f["severity"] == "fail"}


def test_it_moves_along_and_back(counting: Bed) -> None:
    for here, there, name in (("host1", "host2", "/data"), ("host2", "host1", DATA)):
        counting.move(here, NAME, there, "--volume", f"{name}=copy")
        counts(counting, there, here)
        # What was above it was made for it, and stays: there may be something else by now.
        assert data(counting, there).parent.is_dir()


@pytest.mark.parametrize(
    ("place", "here", "there"),
    [
        ("prepare.result:after", "host1", "host2"),
        ("precopy.result:after", "host1", "host2"),
        ("commit.decided:after", "host2", "host1"),
    ],
)
def test_its_coordinator_is_killed(counting: Bed, place: str, here: str, there: str) -> None:
    bed = counting
    move = Stopped(bed, "host1", place, "migrate", "move", "--volume", "*=copy", NAME, "host2")
    move.signal(signal.SIGKILL)
    move.go_on()
    bed.run("host1", "migrate", "recover")
    counts(bed, here, there)


def test_what_somebody_made_there_since_is_not_removed(counting: Bed) -> None:
    """The move goes forward, and has its own directory to remove, not another one that has its name by then."""
    bed = counting
    move = Stopped(bed, "host1", "commit.released:after", "migrate", "move", "--volume", "/data=copy", NAME, "host2")
    move.signal(signal.SIGKILL)
    move.go_on()
    bed.ok("host1", "sh", "-ec", f"mv {DATA} {DATA}.old; mkdir {DATA}; touch {DATA}/new")
    bed.run("host1", "migrate", "recover")
    assert bed.status("host2", NAME) == "running" and bed.status("host1", NAME) is None
    assert (data(bed, "host1") / "new").exists()
    assert_gapless(numbers(data(bed, "host2") / "count"))


def test_what_is_in_the_way_is_said(counting: Bed) -> None:
    bed = counting
    assert findings(bed) == {"bind-source-missing"}
    assert findings(bed, "--volume", "/data=refuse") == {"volume-refused", "bind-source-missing"}
    assert findings(bed, "--volume", "/daten=copy") == {"volume-unknown", "bind-source-missing"}
    assert bed.run("host1", "migrate", "check", "--volume", "/data=copies", NAME, "host2").returncode == 2
    # A container that has its bundle in it.
    BundleMaker(data(bed, "host1"))("sleep", "1000", path=data(bed, "host1") / "another")
    bed.start("host1", f"{DATA}/another", "another")
    assert findings(bed, "--volume", "/data=copy") == {"volume-shared"}
    bed.ok("host1", "runtime", "delete", "--force", "another")
    data(bed, "host2").mkdir(parents=True)
    assert findings(bed, "--volume", "/data=copy") == {"volume-exists"}
    bed.ok("host1", "mount", "-t", "tmpfs", "t", DATA)
    assert "volume-no-directory" in findings(bed, "--volume", "/data=copy")
    bed.ok("host1", "umount", DATA)


def test_what_is_shared_is_seen_to_be(counting: Bed) -> None:
    """There is a directory of that path on the target, but another one."""
    bed = counting
    data(bed, "host2").mkdir(parents=True)
    before = data(bed, "host1").stat().st_mtime_ns
    done = bed.run("host1", "migrate", "move", "--json", "--volume", "/data=shared", NAME, "host2")
    assert done.returncode == 4 and json.loads(done.stdout)["error"]["code"] == "not-shared"
    assert data(bed, "host1").stat().st_mtime_ns == before
    assert not bed.path("host2", BUNDLE).exists() and data(bed, "host2").exists()


def test_a_shared_volume(bed: Bed) -> None:
    # Below the bed's own directory: there both hosts see the same.
    shared = bed.directory / "shared"
    shared.mkdir()
    start(bed, str(shared))
    wait_for(lambda: len(numbers(shared / "count")) > 3, "counting")
    bed.move("host1", NAME, "host2", "--volume", "/data=shared")
    at = len(numbers(shared / "count"))
    wait_for(lambda: len(numbers(shared / "count")) > at + 3, "counting on host2")
    assert_gapless(numbers(shared / "count"))
    assert bed.status("host2", NAME) == "running"
