"""The attributes of a process, looked at from inside or in /proc."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.oci import Oci


def with_process(**members: Any) -> Any:
    return lambda config: config["process"].update(members)


def test_oom_score_adj(oci: Oci, bundles: BundleMaker) -> None:
    assert oci.inside(bundles("cat", "/proc/self/oom_score_adj", change=with_process(oomScoreAdj=321))) == "321\n"


@pytest.mark.ferry
def test_scheduler(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "60", change=with_process(scheduler={"policy": "SCHED_BATCH", "nice": 7})), "c")
    pid = oci.state("c")["pid"]
    assert os.sched_getscheduler(pid) == os.SCHED_BATCH
    assert os.getpriority(os.PRIO_PROCESS, pid) == 7


@pytest.mark.ferry
def test_scheduler_that_the_kernel_refuses(oci: Oci, bundles: BundleMaker) -> None:
    change = with_process(scheduler={"policy": "SCHED_DEADLINE", "runtime": 2, "deadline": 1, "period": 1})
    done = oci.run("run", "--bundle", bundles("true", change=change), "c")
    assert done.returncode == 1 and "/process/scheduler" in done.stderr


@pytest.mark.ferry
@pytest.mark.parametrize(
    ("io_class", "word"),
    [("IOPRIO_CLASS_IDLE", "idle"), ("IOPRIO_CLASS_BE", "best-effort: prio 6"), ("IOPRIO_CLASS_RT", "realtime")],
)
def test_io_priority(oci: Oci, bundles: BundleMaker, io_class: str, word: str) -> None:
    oci.detached(bundles("sleep", "60", change=with_process(ioPriority={"class": io_class, "priority": 6})), "c")
    pid = str(oci.state("c")["pid"])
    assert word in subprocess.run(["ionice", "-p", pid], capture_output=True, text=True, check=True).stdout


@pytest.mark.ferry
def test_exec_cpu_affinity(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    oci.detached(bundles("sleep", "60"), "c")
    process = {"args": ["grep", "Cpus_allowed_list", "/proc/self/status"], "cwd": "/", "execCPUAffinity": {"final": "1"}}
    process["env"] = ["PATH=/bin"]
    (tmp_path / "process.json").write_text(json.dumps(process))
    assert oci.ok("exec", "--process", tmp_path / "process.json", "c").split() == ["Cpus_allowed_list:", "1"]


@pytest.mark.ferry
@pytest.mark.parametrize(("domain", "machine"), [("LINUX32", {"i686", "armv7l", "armv8l"}), ("LINUX", {os.uname().machine})])
def test_personality(oci: Oci, bundles: BundleMaker, domain: str, machine: set[str]) -> None:
    out = oci.inside(bundles("uname", "-m", change=lambda c: c["linux"].update(personality={"domain": domain})))
    assert out.strip() in machine


def test_umask(oci: Oci, bundles: BundleMaker) -> None:
    assert oci.inside(bundles("sh", "-c", "umask", change=with_process(user={"uid": 0, "gid": 0, "umask": 0o27}))) == "0027\n"


def test_additional_groups(oci: Oci, bundles: BundleMaker) -> None:
    user = {"uid": 1000, "gid": 1000, "additionalGids": [5, 6]}
    assert oci.inside(bundles("id", "-G", change=with_process(user=user))).split() == ["1000", "5", "6"]


def test_domainname(oci: Oci, bundles: BundleMaker) -> None:
    out = oci.inside(bundles("cat", "/proc/sys/kernel/domainname", change=lambda c: c.update(domainname="ferry.example")))
    assert out == ("ferry.example\n" if "runc" not in oci.command else out)


def test_five_capability_sets(oci: Oci, bundles: BundleMaker) -> None:
    sets = {
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID"],
        "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_CHOWN"],
        "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL"],
    }
    change = with_process(capabilities=sets, user={"uid": 1000, "gid": 1000})
    out = oci.inside(bundles("grep", "Cap", "/proc/self/status", change=change))
    found = {line.split()[0]: int(line.split()[1], 16) for line in out.splitlines()}
    chown, kill, setuid = 1 << 0, 1 << 5, 1 << 7
    # A user's execve keeps what is ambient.
    assert found == {"CapInh:": kill, "CapPrm:": kill, "CapEff:": kill, "CapBnd:": chown | kill | setuid, "CapAmb:": kill}


@pytest.mark.ferry
def test_nothing_is_inheritable_that_was_not_asked_for(oci: Oci, bundles: BundleMaker) -> None:
    """CVE-2022-29162: `exec --cap` must not make capabilities inheritable."""
    oci.detached(bundles("sleep", "60"), "c")
    out = oci.ok("exec", "--cap", "CAP_CHOWN", "c", "grep", "-E", "CapInh|CapAmb", "/proc/self/status")
    assert [int(line.split()[1], 16) for line in out.splitlines()] == [0, 0]


@pytest.mark.ferry
@pytest.mark.parametrize(
    ("member", "value", "words"),
    [
        ("apparmorProfile", "ferry-test", "no AppArmor"),
        ("selinuxLabel", "system_u:system_r:container_t:s0", "no SELinux"),
    ],
)
def test_a_label_that_the_kernel_cannot_give_is_refused(
    oci: Oci, bundles: BundleMaker, member: str, value: str, words: str
) -> None:
    has_it = {
        "apparmorProfile": Path("/sys/module/apparmor/parameters/enabled"),
        "selinuxLabel": Path("/sys/fs/selinux/enforce"),
    }[member].exists()
    done = oci.run("run", "--bundle", bundles("true", change=with_process(**{member: value})), "c")
    assert done.returncode == 1 and f"/process/{member}" in done.stderr
    assert words in done.stderr or has_it
