"""A container that is slowed down while its memory is followed, and has its speed back whatever happens."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from runtime.container.container import Container
from runtime.container.store import Store
from tests.helpers.bundle import BundleMaker
from tests.helpers.following import Following
from tests.helpers.memory import following, system
from tests.helpers.oci import Oci, wait_for

pytestmark = [pytest.mark.ferry, following]


@pytest.fixture
def spinning(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> tuple[Path, Following]:
    """A container that takes all the CPU time that it gets, followed."""
    program = "open('/up', 'w')\nwhile True: pass"
    bundle = bundles("/usr/bin/python3", "-c", program, change=system)
    oci.detached(bundle, "c")
    wait_for((bundle / "rootfs/up").exists, "the program", 60)
    return bundle, Following(oci, tmp_path / "images", tmp_path / "there")


def quota(oci: Oci) -> int:
    found, _ = Container(Store(oci.root), "c").manager().cpu_quota()
    return found


def test_it_is_slowed_down_and_is_not_when_it_is_dumped(oci: Oci, spinning: tuple[Path, Following]) -> None:
    _, following = spinning
    following.say("pass", "passed")
    half = following.say("throttle 50", "throttled")["cpus"]
    assert 0.01 < half < 0.8 and quota(oci) == pytest.approx(half * 100_000, abs=1)
    tenth = following.say("throttle 10", "throttled")["cpus"]
    assert tenth == pytest.approx(half / 5, rel=0.2)
    manager = Container(Store(oci.root), "c").manager()

    def takes() -> float:
        used, began = manager.cpu_used_ns(), time.monotonic()
        time.sleep(0.5)
        return (manager.cpu_used_ns() - used) / 1e9 / (time.monotonic() - began)

    # What was saved up before is used up first.
    wait_for(lambda: takes() < 2 * tenth + 0.02, "its being slow")
    following.to_the_hold()
    assert quota(oci) == -1
    following.finish()


@pytest.mark.parametrize("way", ["abort", "gone", "killed"])
def test_it_has_its_speed_back(oci: Oci, spinning: tuple[Path, Following], way: str) -> None:
    """Also when whoever slowed it down is killed: whatever has to do with its limits next puts them back."""
    _, following = spinning
    oci.ok("update", "--cpu-quota", "150000", "c")
    following.say("pass", "passed")
    following.say("throttle 50", "throttled")
    following.say("throttle 20", "throttled")
    assert 0 < quota(oci) < 150_000
    if way == "abort":
        following.say("abort", "aborted")
    elif way == "killed":
        following.process.kill()
    following.close()
    if way == "killed":
        assert 0 < quota(oci) < 150_000
        oci.ok("update", "c")
    assert quota(oci) == 150_000
    assert not (oci.root / "c/throttle").exists()


def test_what_somebody_else_has_set_meanwhile_stays(oci: Oci, spinning: tuple[Path, Following]) -> None:
    _, following = spinning
    following.say("pass", "passed")
    following.say("throttle 20", "throttled")
    oci.ok("update", "--cpu-quota", "70000", "c")
    following.say("abort", "aborted")
    following.close()
    assert quota(oci) == 70_000
