"""The life of a container through every verb, and the documents that tools read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from tests.helpers.bundle import BundleMaker, counter, numbers
from tests.helpers.oci import Oci, wait_for


def test_create_waits_for_start(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("sh", "-c", "echo ran >/ran; sleep 100")
    null = subprocess.DEVNULL
    assert oci.run("create", "--bundle", bundle, "c", stdout=null, stderr=null).returncode == 0
    state = oci.state("c")
    assert state["status"] == "created"
    assert state["id"] == "c" and state["bundle"] == str(bundle) and state["pid"] > 0
    assert os.path.exists(f"/proc/{state['pid']}")
    time.sleep(0.2)
    assert not (bundle / "rootfs/ran").exists()
    oci.ok("start", "c")
    wait_for((bundle / "rootfs/ran").exists, "the program's start")
    assert oci.status("c") == "running"


@pytest.mark.v2
@pytest.mark.ferry
def test_no_process_of_ours_stays_after_start(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "100"), "c")
    pid = oci.state("c")["pid"]
    assert json.loads(oci.ok("ps", "--format", "json", "c")) == [pid]
    command = open(f"/proc/{pid}/cmdline").read().split("\0")[:2]
    assert command == ["sleep", "100"]
    parent = int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
    assert "runtime" not in open(f"/proc/{parent}/cmdline").read()


def test_state_and_list_have_runcs_members(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("sleep", "100", change=lambda c: c.update(annotations={"org.example.key": "value"}))
    oci.detached(bundle, "c")
    state = oci.state("c")
    assert set(state) >= {"ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "owner", "annotations"}
    assert state["annotations"]["org.example.key"] == "value"
    listed = json.loads(oci.ok("list", "--format", "json"))
    assert [(c["id"], c["status"], c["pid"]) for c in listed] == [("c", "running", state["pid"])]
    assert oci.ok("list", "--quiet").split() == ["c"]
    table = oci.ok("list").splitlines()
    assert table[0].split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert table[1].split()[:3] == ["c", str(state["pid"]), "running"]


def test_an_empty_list_is_null(oci: Oci) -> None:
    assert json.loads(oci.ok("list", "--format", "json")) is None


@pytest.mark.v2
def test_pause_stops_and_resume_goes_on(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles(*counter())
    oci.detached(bundle, "c")
    count = bundle / "rootfs/count"
    wait_for(lambda: len(numbers(count)) > 3, "counting")
    oci.ok("pause", "c")
    assert oci.status("c") == "paused"
    at = numbers(count)
    time.sleep(0.3)
    assert numbers(count) == at
    oci.ok("resume", "c")
    assert oci.status("c") == "running"
    wait_for(lambda: len(numbers(count)) > len(at), "counting after resume")


@pytest.mark.v2
def test_kill_and_delete(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done"), "c")
    refused = oci.run("delete", "c")
    assert refused.returncode != 0 and "not stopped" in refused.stderr
    oci.ok("kill", "c", "TERM")
    oci.wait_status("c", "stopped")
    killed = oci.run("kill", "c", "KILL")
    assert killed.returncode != 0 and "not running" in killed.stderr
    oci.ok("delete", "c")
    gone = oci.run("state", "c")
    assert gone.returncode != 0 and "does not exist" in gone.stderr


@pytest.mark.v2
def test_delete_force_kills_a_paused_container(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "100"), "c")
    oci.ok("pause", "c")
    oci.ok("delete", "--force", "c")
    assert "does not exist" in oci.run("state", "c").stderr


def test_delete_force_of_what_is_not_there_is_no_error(oci: Oci) -> None:
    assert oci.run("delete", "--force", "nothing").returncode == 0
    assert "does not exist" in oci.run("delete", "nothing").stderr


def test_an_id_is_taken_once(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("sleep", "100")
    oci.detached(bundle, "c")
    again = oci.run("run", "--bundle", bundle, "c")
    assert again.returncode != 0 and "exist" in again.stderr
    assert oci.status("c") == "running"


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_exit_status_passes_through(oci: Oci, bundles: BundleMaker, status: int) -> None:
    assert oci.run("run", "--bundle", bundles("sh", "-c", f"exit {status}"), "c").returncode == status


def test_a_signal_becomes_128_plus_its_number(oci: Oci, bundles: BundleMaker) -> None:
    # The first process of a pid namespace is killed by a signal only from outside.
    bundle = bundles("sleep", "100")
    process = subprocess.Popen(oci.argv("run", "--bundle", bundle, "c"), stdin=subprocess.DEVNULL)
    wait_for(lambda: oci.run("state", "c").returncode == 0 and oci.status("c") == "running", "run")
    oci.ok("kill", "c", "KILL")
    assert process.wait(10) == 128 + signal.SIGKILL


def test_signals_pass_through_to_the_container(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("sh", "-c", "trap 'exit 42' USR1; echo ready >/ready; while :; do sleep 0.05; done")
    process = subprocess.Popen(oci.argv("run", "--bundle", bundle, "c"), stdin=subprocess.DEVNULL)
    wait_for((bundle / "rootfs/ready").exists, "the trap")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 42


def test_stdin_and_stdout_pass_through(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("tr", "a-z", "A-Z")
    done = subprocess.run(oci.argv("run", "--bundle", bundle, "c"), input="ferry\n", capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "FERRY\n")


def test_preserve_fds_passes_descriptors_on(oci: Oci, bundles: BundleMaker) -> None:
    read, write = os.pipe()
    # Descriptor 3 of the container is the pipe; 4 and above are closed.
    bundle = bundles("sh", "-c", "echo through >&3; ls /proc/self/fd | wc -l")
    argv = oci.argv("run", "--preserve-fds", "1", "--bundle", bundle, "c")
    script = f'[ {write} = 3 ] || exec 3>&{write}; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *argv],
        pass_fds=(write,),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    os.close(write)
    assert os.read(read, 100) == b"through\n"
    os.close(read)
    assert int(done.stdout) == 5  # 0, 1, 2, 3 and the one that ls has open


def test_pid_file(oci: Oci, bundles: BundleMaker, tmp_path: object) -> None:
    pid_file = f"{tmp_path}/pid"
    oci.detached(bundles("sleep", "100"), "c", "--pid-file", pid_file)
    assert int(open(pid_file).read()) == oci.state("c")["pid"]


@pytest.mark.ferry
def test_json_log(oci: Oci, tmp_path: object) -> None:
    log = f"{tmp_path}/log"
    done = oci.run("start", "nothing", before=("--log", log, "--log-format", "json"))
    entry = json.loads(open(log).read().splitlines()[-1])
    assert (entry["level"], entry["msg"]) == ("error", "container does not exist: nothing")
    assert "container does not exist" in done.stderr


@pytest.mark.parametrize("name", ["TERM", "HUP", "INT"])
def test_a_signal_before_start_ends_the_container(oci: Oci, bundles: BundleMaker, name: str) -> None:
    null = subprocess.DEVNULL
    oci.ok("create", "--bundle", bundles("sleep", "60"), "c", stdout=null, stderr=null)
    oci.ok("kill", "c", name)
    oci.wait_status("c", "stopped")
    oci.ok("delete", "c")


def test_a_created_container_is_deleted_without_force(oci: Oci, bundles: BundleMaker) -> None:
    null = subprocess.DEVNULL
    oci.ok("create", "--bundle", bundles("sleep", "60"), "c", stdout=null, stderr=null)
    oci.ok("delete", "c")
    assert oci.run("state", "c").returncode != 0


def test_signal_0_asks_whether_it_is_there(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "60"), "c")
    oci.ok("kill", "c", "0")
    assert oci.status("c") == "running"
