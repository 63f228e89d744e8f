"""Bad input and crashes: a clear error, the right status, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.oci import Oci, wait_for


def _refused(oci: Oci, bundle: Path, *words: str) -> None:
    done = oci.run("run", "--bundle", bundle, "c")
    assert done.returncode == 1, done
    for word in words:
        assert word in done.stderr, done.stderr
    assert "does not exist" in oci.run("state", "c").stderr


@pytest.mark.ferry
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("ociVersion"), ["/ociVersion: is required"]),
        (lambda c: c.update(ociVersion="2.0.0"), ["/ociVersion", "2.0.0"]),
        (lambda c: c.pop("root"), ["/root: is required"]),
        (lambda c: c["root"].update(path="nowhere"), ["/root/path", "nowhere"]),
        (lambda c: c["process"].update(args=[]), ["/process/args"]),
        (lambda c: c["process"].update(args=[1]), ["/process/args/0: must be a string"]),
        (lambda c: c["process"].update(cwd="here"), ["/process/cwd"]),
        (
            lambda c: c["process"].update(rlimits=[{"type": "RLIMIT_X", "soft": 1, "hard": 1}]),
            ["/process/rlimits/0/type", "RLIMIT_X"],
        ),
        (lambda c: c["linux"].update(namespaces=[{"type": "moon"}]), ["/linux/namespaces/0/type", "moon"]),
        (lambda c: c["linux"].update(seccomp={"defaultAction": "SCMP_ACT_MAYBE"}), ["/linux/seccomp/defaultAction", "MAYBE"]),
        (lambda c: c["linux"].update(sysctl={"kernel.panic": "1"}), ["/linux/sysctl/kernel.panic"]),
        (
            lambda c: c["mounts"].append({"destination": "/x", "type": "bind", "source": "/no/where"}),
            ["/no/where", "does not exist"],
        ),
        (lambda c: c["mounts"].append({"destination": "/x", "type": "nofs", "source": "x"}), ["/x", "No such device"]),
    ],
)
def test_a_bad_config_is_named(oci: Oci, bundles: BundleMaker, change: Any, words: list[str]) -> None:
    _refused(oci, bundles("true", change=change), *words)


@pytest.mark.ferry
def test_no_config_and_no_json(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    _refused(oci, tmp_path, "config.json", "not found")
    (tmp_path / "config.json").write_text("{")
    _refused(oci, tmp_path, "is not JSON")


def test_a_command_that_is_not_there(oci: Oci, bundles: BundleMaker) -> None:
    done = oci.run("run", "--bundle", bundles("nothing"), "c")
    assert done.returncode != 0 and "executable file not found in $PATH" in done.stderr
    assert "does not exist" in oci.run("state", "c").stderr


@pytest.mark.ferry
@pytest.mark.parametrize("container_id", ["../x", "a/b", "", ".", "x" * 300])
def test_an_id_that_is_none(oci: Oci, bundles: BundleMaker, container_id: str) -> None:
    done = oci.run("run", "--bundle", bundles("true"), container_id)
    assert done.returncode == 1 and "not valid" in done.stderr


@pytest.mark.ferry
@pytest.mark.parametrize("delay_ms", [20, 60, 80, 100, 120, 150, 200])
def test_a_create_that_is_killed_can_be_deleted(oci: Oci, bundles: BundleMaker, delay_ms: int) -> None:
    """Whenever create dies, no process of its container lives on by itself, and delete cleans up."""
    process = subprocess.Popen(oci.argv("create", "--bundle", bundles("sleep", "100"), "c"), stdin=subprocess.DEVNULL)
    time.sleep(delay_ms / 1000)
    process.kill()
    process.wait()
    if oci.run("state", "c").returncode == 0:
        assert oci.status("c") in ("creating", "stopped", "created")
        oci.ok("delete", "--force", "c")
    assert "does not exist" in oci.run("state", "c").stderr


@pytest.mark.ferry
def test_a_start_that_is_killed_leaves_a_true_status(oci: Oci, bundles: BundleMaker) -> None:
    null = subprocess.DEVNULL
    for delay_ms in (30, 60, 90):
        assert oci.run("create", "--bundle", bundles("sleep", "100"), "c", stdout=null, stderr=null).returncode == 0
        process = subprocess.Popen(oci.argv("start", "c"), stdin=null)
        time.sleep(delay_ms / 1000)
        process.kill()
        process.wait()
        started = Path(f"/proc/{oci.state('c')['pid']}/cmdline").read_bytes().startswith(b"sleep")
        assert oci.status("c") == ("running" if started else "created")
        oci.ok("delete", "--force", "c")


@pytest.mark.ferry
def test_two_verbs_at_once_are_serialised(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "100"), "c")
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(oci.run("delete", "--force", "c").returncode)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [0, 0, 0, 0]
    assert not (oci.root / "c").exists()


@pytest.mark.ferry
def test_two_creates_of_one_id(oci: Oci, bundles: BundleMaker) -> None:
    bundle, results = bundles("sleep", "100"), []
    null = subprocess.DEVNULL

    def create() -> None:
        results.append(oci.run("create", "--bundle", bundle, "c", stdout=null, stderr=null).returncode)

    threads = [threading.Thread(target=create) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(results) == [0, 1, 1]
    assert oci.status("c") == "created"


def test_a_process_that_took_the_number_is_not_the_container(oci: Oci, bundles: BundleMaker) -> None:
    if oci.command == "runc":
        pytest.skip("runc's state has another form")
    oci.detached(bundles("sleep", "100"), "c")
    oci.ok("kill", "c", "KILL")
    oci.wait_status("c", "stopped")
    path = oci.root / "c/state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "pid": os.getpid()}))
    assert oci.status("c") == "stopped"
    assert "not running" in oci.run("kill", "c", "TERM").stderr


@pytest.mark.ferry
def test_a_damaged_state_is_an_error_and_can_be_seen(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "100"), "c")
    path = oci.root / "c/state.json"
    whole = path.read_text()
    path.write_text(whole[:20])
    done = oci.run("state", "c")
    assert done.returncode == 1 and "state.json" in done.stderr
    path.write_text(whole)


@pytest.mark.ferry
def test_what_a_verb_loads(oci: Oci) -> None:
    """The verbs that tools call often must not import what only checkpoints need."""
    code = (
        "import sys; from runtime.cli.main import run; run(['--root', sys.argv[1], 'list', '-q']); print(' '.join(sys.modules))"
    )
    from tests.helpers.oci import OURS

    python = str(Path(OURS).with_name("python"))
    loaded = subprocess.run([python, "-c", code, str(oci.root)], capture_output=True, text=True, check=True).stdout.split()
    assert not {"google.protobuf", "pycriu", "paramiko", "xxhash", "asyncio", "runtime.process.init"} & set(loaded)


def test_a_killed_run_leaves_the_container(oci: Oci, bundles: BundleMaker) -> None:
    process = subprocess.Popen(oci.argv("run", "--bundle", bundles("sleep", "100"), "c"), stdin=subprocess.DEVNULL)
    wait_for(lambda: oci.run("state", "c").returncode == 0 and oci.status("c") == "running", "run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert oci.status("c") == "running"
