"""`exec`: one more process in a container, with the container's settings or others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.oci import Oci


@pytest.fixture
def running(oci: Oci, bundles: BundleMaker) -> Oci:
    oci.detached(bundles("sleep", "100"), "c")
    return oci


def test_it_is_inside(running: Oci) -> None:
    assert running.ok("exec", "c", "hostname").strip() == "ferry"
    assert "sleep 100" in running.ok("exec", "c", "ps")
    pid = running.state("c")["pid"]
    inside = running.ok(
        "exec", "c", "sh", "-c", "for n in cgroup ipc mnt net pid uts; do readlink /proc/self/ns/$n; done"
    ).split()
    assert inside == [os.readlink(f"/proc/{pid}/ns/{n}") for n in ("cgroup", "ipc", "mnt", "net", "pid", "uts")]


def test_exit_status(running: Oci) -> None:
    assert running.run("exec", "c", "sh", "-c", "exit 9").returncode == 9
    assert running.run("exec", "c", "sh", "-c", "kill -9 $$").returncode == 137


def test_options(running: Oci) -> None:
    script = "pwd; echo $A; id -u; id -g; id -G; grep CapBnd /proc/self/status"
    out = running.ok(
        "exec",
        "--cwd",
        "/tmp",
        "--env",
        "A=b",
        "--user",
        "1000:1000",
        "--additional-gids",
        "7",
        "--cap",
        "CAP_CHOWN",
        "c",
        "sh",
        "-c",
        script,
    )
    lines = out.split("\n")
    assert lines[:4] == ["/tmp", "b", "1000", "1000"] and "7" in lines[4].split()
    assert int(lines[5].split()[1], 16) & 1


def test_a_process_document(running: Oci, tmp_path: Path) -> None:
    document = {"args": ["sh", "-c", "echo $X; pwd"], "cwd": "/etc", "env": ["X=y", "PATH=/bin"], "user": {"uid": 0, "gid": 0}}
    (tmp_path / "process.json").write_text(json.dumps(document))
    assert running.ok("exec", "--process", tmp_path / "process.json", "c").split() == ["y", "/etc"]


@pytest.mark.ferry  # runc wants a terminal of its caller's
def test_a_terminal(running: Oci) -> None:
    assert running.ok("exec", "--tty", "c", "tty").strip().startswith("/dev/pts/")


def test_what_is_not_there(running: Oci) -> None:
    done = running.run("exec", "c", "nothing")
    assert done.returncode != 0 and "executable file not found in $PATH" in done.stderr
    assert running.status("c") == "running"


def test_in_a_stopped_container(running: Oci) -> None:
    running.ok("kill", "c", "KILL")
    running.wait_status("c", "stopped")
    done = running.run("exec", "c", "true")
    assert done.returncode != 0 and "cannot exec in a stopped container" in done.stderr


def test_in_a_paused_container(running: Oci) -> None:
    running.ok("pause", "c")
    done = running.run("exec", "c", "true")
    assert done.returncode != 0 and "paused" in done.stderr


def test_detached_with_pid_file(running: Oci, tmp_path: Path) -> None:
    running.ok("exec", "--detach", "--pid-file", tmp_path / "pid", "c", "sleep", "50", stdout=None, stderr=None)
    pid = int((tmp_path / "pid").read_text())
    assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x0050\x00"
    assert pid in json.loads(running.ok("ps", "--format", "json", "c"))


@pytest.mark.parametrize(
    "args", [("-u", "-1"), ("-u", "4294967295"), ("-u", "1:-1"), ("-u", "name"), ("-g", "-1"), ("--cwd", "tmp"), ("--env", "X")]
)
def test_what_no_process_can_have(running: Oci, args: tuple[str, ...]) -> None:
    done = running.run("exec", *args, "c", "id")
    assert done.returncode != 0 and done.stdout == "" and "Traceback" not in done.stderr
