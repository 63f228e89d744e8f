"""The systemd driver and a pure cgroup v2 tree: run inside the guest of scripts/guest, where systemd is pid 1."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.cgroups import read, v2_only
from tests.helpers.oci import Oci, wait_for

pytestmark = pytest.mark.v2
SYSTEMD = ("--systemd-cgroup",)


def show(unit: str, name: str) -> str:
    return subprocess.run(["systemctl", "show", "-P", name, unit], capture_output=True, text=True, check=True).stdout.strip()


def with_path(path: str | None, **resources: Any) -> Any:
    def change(config: dict[str, Any]) -> None:
        if path is not None:
            config["linux"]["cgroupsPath"] = path
        config["linux"]["resources"].update(resources)

    return change


def start(oci: Oci, bundle: Path, name: str = "c") -> int:
    null = subprocess.DEVNULL
    done = oci.run("run", "-d", "--bundle", bundle, name, before=SYSTEMD, stdout=null, stderr=null)
    if done.returncode:
        raise AssertionError(oci.run("run", "-d", "--bundle", bundle, f"{name}-again", before=SYSTEMD).stderr)
    return int(oci.state(name)["pid"])


def test_this_is_a_v2_host_with_systemd() -> None:
    assert v2_only() and Path("/run/systemd/system").is_dir()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (None, "/system.slice/ferry-c.scope"),
        ("system.slice:test:one", "/system.slice/test-one.scope"),
        ("outer-inner.slice:test:two", "/outer.slice/outer-inner.slice/test-two.scope"),
    ],
)
def test_the_scope_is_where_it_should_be(oci: Oci, bundles: BundleMaker, path: str | None, expected: str) -> None:
    pid = start(oci, bundles("sleep", "600", change=with_path(path)))
    assert Path(f"/proc/{pid}/cgroup").read_text() == f"0::{expected}\n"
    unit = expected.rsplit("/", 1)[1]
    assert show(unit, "ActiveState") == "active" and show(unit, "Delegate") == "yes"
    assert json.loads(oci.ok("ps", "--format", "json", "c")) == [pid]
    oci.ok("kill", "c", "KILL")
    oci.wait_status("c", "stopped")
    oci.ok("delete", "c")
    assert not Path(f"/sys/fs/cgroup{expected}").exists()
    wait_for(lambda: show(unit, "LoadState") == "not-found", "the end of the scope")
    # The slices that systemd made on the way are its own to keep.
    subprocess.run(["systemctl", "stop", "outer.slice"], check=True)


def test_limits_reach_systemd_and_the_kernel(oci: Oci, bundles: BundleMaker) -> None:
    limits = {
        "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 96 << 20},
        "cpu": {"shares": 512, "quota": 50_000, "period": 100_000},
        "pids": {"limit": 50},
    }
    pid = start(oci, bundles("sleep", "600", change=with_path("system.slice:test:limits", **limits)))
    unit = "test-limits.scope"
    assert (show(unit, "MemoryMax"), show(unit, "TasksMax"), show(unit, "CPUWeight")) == (str(64 << 20), "50", "20")
    assert show(unit, "CPUQuotaPerSecUSec") == "500ms"
    found = {f: read(pid, "", f) for f in ("memory.max", "memory.low", "memory.swap.max", "pids.max", "cpu.max", "cpu.weight")}
    assert found == {
        "memory.max": str(64 << 20), "memory.low": str(32 << 20), "memory.swap.max": str(32 << 20), "pids.max": "50",
        "cpu.max": "50000 100000", "cpu.weight": "20",
    }  # fmt: skip
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert read(pid, "", "memory.max") == str(64 << 20) and read(pid, "", "pids.max") == "50"
    oci.ok("update", "--memory", "32m", "--memory-swap", "32m", "--pids-limit", "20", "c")
    assert (show(unit, "MemoryMax"), show(unit, "TasksMax")) == (str(32 << 20), "20")
    assert (read(pid, "", "memory.max"), read(pid, "", "pids.max")) == (str(32 << 20), "20")


@pytest.mark.parametrize("path", ["/not/systemds", "a:b", "no-slice:x:y", "bad--.slice:x:y"])
def test_a_path_that_systemd_cannot_have(oci: Oci, bundles: BundleMaker, path: str) -> None:
    done = oci.run("run", "--bundle", bundles("true", change=with_path(path)), "c", before=SYSTEMD)
    assert done.returncode == 1 and "/linux/cgroupsPath" in done.stderr
    assert oci.ok("list", "-q") == ""


def test_what_systemd_refuses_leaves_nothing(oci: Oci, bundles: BundleMaker) -> None:
    start(oci, bundles("sleep", "600", change=with_path("system.slice:test:taken")), "first")
    done = oci.run("run", "--bundle", bundles("true", change=with_path("system.slice:test:taken")), "c", before=SYSTEMD)
    assert done.returncode == 1 and done.stderr
    assert oci.ok("list", "-q").split() == ["first"] and oci.status("first") == "running"


def test_exec_and_pause_in_a_scope(oci: Oci, bundles: BundleMaker) -> None:
    start(oci, bundles("sleep", "600"))
    assert oci.ok("exec", "c", "cat", "/proc/self/cgroup") == "0::/\n"
    oci.ok("pause", "c")
    assert oci.status("c") == "paused"
    oci.ok("resume", "c")
    assert oci.status("c") == "running"


def test_unified_idle_burst_and_io(oci: Oci, bundles: BundleMaker) -> None:
    device = os.stat("/").st_dev
    change = with_path(
        None,
        unified={"memory.high": "50000000"},
        cpu={"quota": 50_000, "period": 100_000, "burst": 10_000},
        blockIO={"throttleReadBpsDevice": [{"major": os.major(device), "minor": os.minor(device), "rate": 1 << 20}]},
    )
    oci.detached(bundles("sleep", "600", change=change), "c")
    pid = oci.state("c")["pid"]
    assert read(pid, "", "memory.high") == str(50000000 // 4096 * 4096)
    assert read(pid, "", "cpu.max.burst") == "10000"
    assert f"{os.major(device)}:{os.minor(device)} rbps={1 << 20}" in read(pid, "", "io.max")
    oci.detached(bundles("sleep", "600", change=with_path(None, cpu={"idle": 1})), "d")
    assert read(oci.state("d")["pid"], "", "cpu.idle") == "1"


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"memory": {"swappiness": 10}}, "/linux/resources/memory/swappiness"),
        ({"network": {"classID": 1}}, "/linux/resources/network/classID"),
        ({"unified": {"no.such.file": "1"}}, "/linux/resources/unified/no.such.file"),
        ({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]}, "/linux/resources/hugepageLimits"),
    ],
)
def test_what_v2_lacks_is_named(oci: Oci, bundles: BundleMaker, resources: dict[str, Any], words: str) -> None:
    done = oci.run("run", "--bundle", bundles("true", change=with_path(None, **resources)), "c")
    assert done.returncode == 1 and words in done.stderr


def test_device_rules_as_a_program(oci: Oci, bundles: BundleMaker) -> None:
    def change(config: dict[str, Any]) -> None:
        for name in ("bounding", "effective", "permitted"):
            config["process"]["capabilities"][name].append("CAP_MKNOD")
        config["linux"]["resources"]["devices"] += [{"allow": True, "type": "c", "major": 10, "minor": 200, "access": "r"}]

    script = "mknod /tun c 10 200; mknod /mem c 1 1; head -c 0 /tun && echo read; echo x >/tun; head -c 1 /mem; true"
    done = oci.run("run", "--bundle", bundles("sh", "-c", script, change=change), "c")
    assert done.stdout == "read\n" and done.stderr.count("Operation not permitted") == 2, done


def test_apparmor_profile_is_taken_on(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    enabled = Path("/sys/module/apparmor/parameters/enabled")
    profiles = Path("/sys/kernel/security/apparmor/profiles")
    if not (enabled.exists() and enabled.read_text().strip() == "Y"):
        pytest.fail("the guest's kernel has AppArmor: boot it with apparmor=1 security=apparmor")

    def change(config: dict[str, Any]) -> None:
        config["process"]["apparmorProfile"] = "ferry-no-such-profile"

    done = oci.run("run", "--bundle", bundles("cat", "/proc/self/attr/current", change=change), "c")
    # Without a loaded profile of that name the kernel refuses it: that shows that it was asked.
    assert done.returncode == 1 and "ferry-no-such-profile" in done.stderr
    assert profiles.exists() or tmp_path
