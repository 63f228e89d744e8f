"""The other ways in which a host may mount its cgroups: v2 alone, and v1 alone.

Each is a real tree, mounted over the machine's own in a mount namespace. Controllers that the machine has on v1 are not
there on its v2 tree; what v2 does without them (freezing, killing, device programs, namespaces) is.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.cgroups.manager import host_layout
from tests.helpers.bundle import BundleMaker, Config, assert_gapless, counter, numbers
from tests.helpers.elsewhere import Elsewhere, mounted
from tests.helpers.oci import wait_for

pytestmark = pytest.mark.ferry

TREES = {
    "v2": "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup",
    "v1": "! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified",
}


@pytest.fixture(params=sorted(TREES))
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Elsewhere]:
    if request.param == "v1" and host_layout().mode == "v2":
        pytest.skip("this kernel's controllers are on the v2 tree: there is no v1 tree to mount")
    with mounted(TREES[request.param], tmp_path / "elsewhere") as oci:
        yield oci


def test_life(elsewhere: Elsewhere, bundles: BundleMaker, tmp_path: Path) -> None:
    oci, bundle = elsewhere, bundles(*counter())
    oci.detached(bundle, "c")
    count = bundle / "rootfs/count"
    wait_for(lambda: len(numbers(count)) > 3, "counting")
    oci.ok("pause", "c")
    assert oci.status("c") == "paused"
    oci.ok("resume", "c")
    oci.ok("checkpoint", "--image-path", tmp_path / "images", "c")
    assert "does not exist" in oci.run("state", "c").stderr
    null = subprocess.DEVNULL
    argv = ("restore", "--detach", "--image-path", tmp_path / "images", "--bundle", bundle, "c")
    done = oci.run(*argv, stdout=null, stderr=null)
    assert done.returncode == 0, oci.run(*argv).stderr
    at = len(numbers(count))
    wait_for(lambda: len(numbers(count)) > at + 3, "counting after the restore")
    assert_gapless(numbers(count))
    oci.ok("pause", "c")
    oci.ok("delete", "--force", "c")


def test_devices(elsewhere: Elsewhere, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["linux"]["devices"] = [{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666}]

    out = elsewhere.ok(
        "run", "--bundle", bundles("sh", "-c", "head -c1 /dev/zero | wc -c; head -c1 /dev/kmsg 2>&1; true", change=change), "c"
    )
    assert out.split("\n")[0] == "1" and "not permitted" in out


def test_a_limit_without_its_controller_is_an_error(elsewhere: Elsewhere, bundles: BundleMaker) -> None:
    bundle = bundles("true", change=lambda c: c["linux"]["resources"].update(pids={"limit": 9}, memory={"limit": 1 << 27}))
    done = elsewhere.run("run", "--bundle", bundle, "c")
    if host_layout().mode == "hybrid" and "cgroup2" in elsewhere.ok(
        "run", "--bundle", bundles("cat", "/proc/self/mountinfo"), "m"
    ):
        assert done.returncode == 1 and "the kernel or this cgroup lacks the controller" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
