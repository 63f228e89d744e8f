"""linux.resources on cgroup v1: what reaches the kernel's files. (v2: tests/guest.)"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.cgroups import read, v2_only
from tests.helpers.elsewhere import Elsewhere, mounted
from tests.helpers.oci import Oci, wait_for

# Controllers that hosts seldom mount. Whoever mounts a v1 controller makes its tree, for a while.
MORE = " && ".join(f"mkdir -p /tmp/cg-{n} && mount -t cgroup -o {n} {n} /tmp/cg-{n}" for n in ("net_cls", "net_prio"))


def limiting(**resources: Any) -> Any:
    return lambda config: config["linux"]["resources"].update(resources)


def disk() -> tuple[int, int]:
    """Return a block device of this machine's that can be throttled."""
    for device in sorted(Path("/sys/class/block").iterdir()):
        if not (device / "partition").exists() and device.name[:4] not in ("loop", "ram0", "zram"):
            major, _, minor = (device / "dev").read_text().strip().partition(":")
            return int(major), int(minor)
    raise AssertionError("no block device")


MAJOR, MINOR = disk() if not v2_only() else (0, 0)
V1 = [
    ({"memory": {"limit": 64 << 20, "reservation": 32 << 20}}, "memory/memory.soft_limit_in_bytes", str(32 << 20)),
    ({"memory": {"swappiness": 11}}, "memory/memory.swappiness", "11"),
    ({"memory": {"disableOOMKiller": True}}, "memory/memory.oom_control", "oom_kill_disable 1"),
    ({"cpu": {"shares": 333}}, "cpu/cpu.shares", "333"),
    ({"cpu": {"quota": 30000, "period": 60000}}, "cpu/cpu.cfs_period_us", "60000"),
    ({"cpu": {"quota": 30000, "period": 60000, "burst": 10000}}, "cpu/cpu.cfs_burst_us", "10000"),
    ({"cpu": {"idle": 1}}, "cpu/cpu.idle", "1"),
    ({"cpu": {"cpus": "1", "mems": "0"}}, "cpuset/cpuset.cpus", "1"),
    ({"pids": {"limit": 99}}, "pids/pids.max", "99"),
    (
        {"blockIO": {"throttleReadBpsDevice": [{"major": MAJOR, "minor": MINOR, "rate": 1048576}]}},
        "blkio/blkio.throttle.read_bps_device",
        f"{MAJOR}:{MINOR} 1048576",
    ),
    (
        {"blockIO": {"throttleWriteIOPSDevice": [{"major": MAJOR, "minor": MINOR, "rate": 500}]}},
        "blkio/blkio.throttle.write_iops_device",
        f"{MAJOR}:{MINOR} 500",
    ),
]


@pytest.mark.ferry  # runc 1.1 has neither burst nor idle
@pytest.mark.parametrize(("resources", "file", "value"), V1 if not v2_only() else [])
def test_v1(oci: Oci, bundles: BundleMaker, resources: dict[str, Any], file: str, value: str) -> None:
    oci.detached(bundles("sleep", "60", change=limiting(**resources)), "c")
    assert value in read(oci.state("c")["pid"], file, "")


@pytest.mark.ferry
def test_huge_pages_wherever_the_controller_is(oci: Oci, bundles: BundleMaker) -> None:
    """On v1, or on the v2 tree of a hybrid host."""
    oci.detached(bundles("sleep", "60", change=limiting(hugepageLimits=[{"pageSize": "2MB", "limit": 4 << 20}])), "c")
    found = [
        p.read_text().strip()
        for p in Path("/sys/fs/cgroup").glob("**/c/hugetlb.2MB.*")
        if p.name.endswith(("limit_in_bytes", ".2MB.max"))
    ]
    assert str(4 << 20) in found


@pytest.fixture
def more(tmp_path: Path) -> Iterator[Elsewhere]:
    # The controllers' hierarchies end with their last cgroup and mount.
    with mounted(MORE.replace("/tmp/cg-", f"{tmp_path}/cg-"), tmp_path / "state") as oci:
        yield oci
    wait_for(lambda: all(released(name) for name in ("net_cls", "net_prio")), "the end of the trees", timeout_s=30)


def released(controller: str) -> bool:
    """Say whether a v1 tree has ended; one whose cgroups were still going at its last unmount needs one more."""
    if f"\n{controller}\t0\t" in Path("/proc/cgroups").read_text():
        return True
    script = f"mount --make-rprivate / && mount -t cgroup -o {controller} x /mnt && umount /mnt"
    subprocess.run(["unshare", "-m", "sh", "-c", script], check=False, capture_output=True)
    time.sleep(0.5)  # the kernel ends it by and by; asked too soon it would only be mounted again
    return False


def in_namespace(oci: Elsewhere, path: str) -> str:
    """Read a file as the namespace's holder sees it."""
    holder = oci._enter[2]
    return Path(f"/proc/{holder}/root{path}").read_text().strip()


@pytest.mark.ferry
@pytest.mark.skipif(v2_only(), reason="a v2 host has these controllers on its one tree, or not at all")
def test_controllers_that_are_seldom_mounted(more: Elsewhere, bundles: BundleMaker, tmp_path: Path) -> None:
    change = limiting(
        network={"classID": 0x100001, "priorities": [{"name": "lo", "priority": 7}]},
    )
    more.detached(bundles("sleep", "60", change=change), "c")
    assert in_namespace(more, f"{tmp_path}/cg-net_cls/c/net_cls.classid") == str(0x100001)
    assert "lo 7" in in_namespace(more, f"{tmp_path}/cg-net_prio/c/net_prio.ifpriomap")
    more.ok("delete", "--force", "c")


@pytest.mark.ferry
@pytest.mark.skipif(v2_only(), reason="these are v1's words; tests/guest has v2's")
@pytest.mark.parametrize(
    ("resources", "pointer"),
    [
        ({"hugepageLimits": [{"pageSize": "3MB", "limit": 1 << 21}]}, "/linux/resources/hugepageLimits"),
        ({"network": {"classID": 1}}, "/linux/resources/network/classID"),
        ({"rdma": {"mlx5_0": {"hcaHandles": 1}}}, "/linux/resources/rdma/mlx5_0"),
        ({"unified": {"memory.high": "1"}}, "/linux/resources/unified"),
        ({"blockIO": {"leafWeight": 100}}, "/linux/resources/blockIO/leafWeight"),
        ({"cpu": {"cpus": "4000"}}, "/linux/resources/cpu/cpus"),
    ],
)
def test_what_this_host_lacks_is_named(oci: Oci, bundles: BundleMaker, resources: dict[str, Any], pointer: str) -> None:
    done = oci.run("run", "--bundle", bundles("true", change=limiting(**resources)), "c")
    assert done.returncode == 1 and pointer in done.stderr, done
    assert not (oci.root / "c").exists()
