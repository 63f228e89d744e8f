"""Limits, as the kernel's files show them and as the container feels them."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.cgroups.manager import host_layout
from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.oci import Oci

pytestmark = pytest.mark.v2


def _file(pid: int, controller: str, v1: str, v2: str) -> str:
    """Return a limit's value from the container's own cgroup."""
    layout = host_layout()
    hierarchy = layout.of("") if layout.mode == "v2" else layout.of(controller)
    assert hierarchy is not None
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" if layout.mode == "v2" else controller in controllers.split(","):
            return Path(hierarchy.mount_point + path, v2 if layout.mode == "v2" else v1).read_text().strip()
    raise AssertionError(f"no {controller} cgroup")


def test_limits_reach_the_kernel(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["linux"]["resources"].update(
            memory={"limit": 64 << 20}, cpu={"quota": 50_000, "period": 100_000, "shares": 512}, pids={"limit": 20}
        )

    oci.detached(bundles("sleep", "100", change=change), "c")
    pid = oci.state("c")["pid"]
    assert _file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(64 << 20)
    assert _file(pid, "pids", "pids.max", "pids.max") == "20"
    assert _file(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    assert _file(pid, "cpu", "cpu.shares", "cpu.weight") in ("512", "20")


def test_pids_limit_is_felt(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["linux"]["resources"]["pids"] = {"limit": 5}

    done = oci.run(
        "run", "--bundle", bundles("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; wait", change=change), "c"
    )
    assert "fork" in done.stderr


def test_memory_limit_is_felt(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["linux"]["resources"]["memory"] = {"limit": 16 << 20, "swap": 16 << 20}

    bundle = bundles("sh", "-c", "head -c 64000000 /dev/zero | tail -n 1 | wc -c", change=change)
    assert oci.run("run", "--bundle", bundle, "c").stdout.strip() != "64000000"


def test_cgroups_path(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("sleep", "100", change=lambda c: c["linux"].update(cgroupsPath="/ferry-test/inner"))
    oci.detached(bundle, "c")
    lines = Path(f"/proc/{oci.state('c')['pid']}/cgroup").read_text().splitlines()
    assert any(line.endswith(":/ferry-test/inner") for line in lines)
    oci.ok("delete", "--force", "c")
    for hierarchy in host_layout().hierarchies:
        parent = Path(hierarchy.mount_point, "ferry-test")
        assert not (parent / "inner").exists()
        if parent.exists():
            parent.rmdir()


def test_exec_joins_the_cgroups(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "100"), "c")
    init = Path(f"/proc/{oci.state('c')['pid']}/cgroup").read_text()
    oci.ok("exec", "--detach", "c", "sleep", "99", stdout=None, stderr=None)
    pids = [p for p in Path("/proc").glob("[0-9]*/cmdline") if p.read_bytes() == b"sleep\x0099\x00"]
    assert [(p.parent / "cgroup").read_text() for p in pids] == [init]


@pytest.mark.ferry
def test_a_limit_that_is_refused_is_named_and_nothing_is_left(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("true", change=lambda c: c["linux"]["resources"].update(cpu={"cpus": "999"}))
    done = oci.run("run", "--bundle", bundle, "c")
    assert done.returncode == 1 and "/linux/resources/cpu/cpus" in done.stderr
    assert "does not exist" in oci.run("state", "c").stderr
