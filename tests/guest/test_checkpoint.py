"""Checkpoints where the runtime has every capability and cgroups are v2's; and archives as others read them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from runtime.linux.capability import permitted_set
from tests.helpers.bundle import BundleMaker, counter
from tests.helpers.oci import Oci, wait_for
from tests.helpers.scenario import Parked, Scenario
from tests.integration.test_contents import SCENARIOS

pytestmark = pytest.mark.v2
HERE = ("credentials", "user namespaces", "time namespaces", "cgroup limits", "TCP, established", "inotify")


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.name in HERE], ids=str)
def test_it_is_as_it_was(oci: Oci, bundles: BundleMaker, tmp_path: Path, scenario: Scenario) -> None:
    assert "CAP_SYS_RESOURCE" in permitted_set(), "with it, other users' processes need no user namespace"
    parked = Parked(oci, bundles, scenario)
    assert "fail" not in parked.findings(*scenario.flags).values(), parked.findings(*scenario.flags)
    oci.ok("checkpoint", *scenario.flags, "--image-path", tmp_path / "images", "c")
    parked.restore(tmp_path / "images")
    parked.looks()


def test_checkpointctl_reads_our_archives(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles(*counter())
    oci.detached(bundle, "mycounter")
    wait_for((bundle / "rootfs/count").exists, "counting", 30)
    archive = tmp_path / "c.tar.zst"
    oci.ok("checkpoint", "--leave-running", "--base-image", "localhost/base:1", "--export", archive, "mycounter")
    shown = subprocess.run(["checkpointctl", "show", archive], capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "mycounter" in shown.stdout and "localhost/base:1" in shown.stdout, shown
    tree = subprocess.run(
        ["checkpointctl", "inspect", "--ps-tree", "--stats", archive], capture_output=True, text=True, check=False
    )
    assert tree.returncode == 0 and "[1]  sh" in tree.stdout and "Pages written" in tree.stdout, tree
