"""Verbs and flags beyond the life cycle: update, events, exec's options, readiness and sockets of systemd's kind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.cgroups import read, v2_only
from tests.helpers.oci import Oci, wait_for


@pytest.fixture
def running(oci: Oci, bundles: BundleMaker) -> Oci:
    oci.detached(bundles("sleep", "60"), "c")
    return oci


@pytest.mark.v2
@pytest.mark.parametrize(
    ("flags", "v1", "v2", "value"),
    [
        (("--memory", "64m"), "memory/memory.limit_in_bytes", "memory.max", "67108864"),
        (("--memory-reservation", "32m"), "memory/memory.soft_limit_in_bytes", "memory.low", "33554432"),
        (("--cpu-share", "512"), "cpu/cpu.shares", None, "512"),
        (("--cpu-period", "50000", "--cpu-quota", "25000"), "cpu/cpu.cfs_quota_us", None, "25000"),
        (("--cpuset-cpus", "0"), "cpuset/cpuset.cpus", "cpuset.cpus", "0"),
        (("--cpuset-mems", "0"), "cpuset/cpuset.mems", "cpuset.mems", "0"),
        (("--pids-limit", "77"), "pids/pids.max", "pids.max", "77"),
    ],
)
def test_update_by_flags(running: Oci, flags: tuple[str, ...], v1: str, v2: str | None, value: str) -> None:
    if v2 is None and v2_only():
        v2 = {"cpu.shares": "cpu.weight", "cpu.cfs_quota_us": "cpu.max"}[Path(v1).name]
        value = {"cpu.weight": "20", "cpu.max": "25000 50000"}[v2]
    running.ok("update", *flags, "c")
    assert read(running.state("c")["pid"], v1, v2 or "") == value


@pytest.mark.v2
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_update_by_a_document(running: Oci, tmp_path: Path, source: str) -> None:
    document = json.dumps({"memory": {"limit": 50 << 20}, "pids": {"limit": 44}})
    if source == "file":
        (tmp_path / "r.json").write_text(document)
        running.ok("update", "--resources", tmp_path / "r.json", "c")
    else:
        running.ok("update", "-r", "-", "c", stdin=None, input=document)
    pid = running.state("c")["pid"]
    assert read(pid, "memory/memory.limit_in_bytes", "memory.max") == str(50 << 20)
    assert read(pid, "pids/pids.max", "pids.max") == "44"


@pytest.mark.v2
def test_update_raises_and_lowers_memory_and_swap(running: Oci) -> None:
    pid = running.state("c")["pid"]
    for memory, swap in (("64m", "64m"), ("128m", "256m"), ("32m", "32m")):
        if v2_only() or Path("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists():
            running.ok("update", "--memory", memory, "--memory-swap", swap, "c")
        else:
            running.ok("update", "--memory", memory, "c")
        assert read(pid, "memory/memory.limit_in_bytes", "memory.max") == str(int(memory[:-1]) << 20)


@pytest.mark.ferry
@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"memory": {"limit": "much"}}, "/memory/limit"),
        ({"cpu": {"idle": 7}, "pids": {"limit": []}}, "2 violations"),
        ([], "must be an object"),
        ({"memory": {"limit": 1, "checkBeforeUpdate": True}}, "less than the container uses"),
    ],
)
def test_update_with_what_is_wrong(running: Oci, document: Any, words: str) -> None:
    done = running.run("update", "-r", "-", "c", stdin=None, input=json.dumps(document))
    assert done.returncode == 1 and words in done.stderr
    assert running.status("c") == "running"


@pytest.mark.v2
def test_events_stats(running: Oci) -> None:
    event = json.loads(running.ok("events", "--stats", "c"))
    assert (event["type"], event["id"]) == ("stats", "c")
    assert event["data"]["memory"]["usage"]["usage"] > 0 and event["data"]["pids"]["current"] >= 1
    assert event["data"]["cpu"]["usage"]["total"] > 0


@pytest.mark.v2
@pytest.mark.ferry  # runc 1.1 does not end on kernels without v1 memory events
def test_events_go_on_until_the_end(running: Oci) -> None:
    events = subprocess.Popen(running.argv("events", "--interval", "100ms", "c"), stdout=subprocess.PIPE, text=True)
    assert events.stdout is not None
    assert [json.loads(events.stdout.readline())["type"] for _ in range(3)] == ["stats"] * 3
    running.ok("kill", "c", "KILL")
    events.communicate(timeout=20)
    assert events.returncode == 0


@pytest.mark.v2
@pytest.mark.ferry
def test_events_tell_of_kills_for_want_of_memory(oci: Oci, bundles: BundleMaker) -> None:
    def change(config: dict[str, Any]) -> None:
        config["linux"]["resources"]["memory"] = {"limit": 16 << 20}

    script = "while [ ! -e /go ]; do sleep 0.05; done; head -c 100m /dev/zero | tail; sleep 60"
    bundle = bundles("sh", "-c", script, change=change)
    oci.detached(bundle, "c")
    events = subprocess.Popen(oci.argv("events", "--interval", "1h", "c"), stdout=subprocess.PIPE, text=True)
    assert events.stdout is not None
    events.stdout.readline()
    (bundle / "rootfs/go").touch()
    assert json.loads(events.stdout.readline())["type"] == "oom"
    oci.run("kill", "c", "KILL")  # unless that was the kernel
    events.communicate(timeout=20)


def test_events_of_a_stopped_container(running: Oci) -> None:
    running.ok("kill", "c", "KILL")
    running.wait_status("c", "stopped")
    assert running.run("events", "--stats", "c").returncode == 1


@pytest.mark.v2
@pytest.mark.ferry
def test_exec_in_a_cgroup_below(running: Oci) -> None:
    pid = running.state("c")["pid"]
    from runtime.linux.procfs import read_cgroup

    own = read_cgroup(pid)["pids" if not v2_only() else ""]
    base = Path("/sys/fs/cgroup/pids" if not v2_only() else "/sys/fs/cgroup")
    (base / own.lstrip("/") / "inner").mkdir()
    option = "pids:inner" if not v2_only() else "inner"
    out = running.ok("exec", "--cgroup", option, "c", "cat", "/proc/self/cgroup")
    assert any(line.endswith("/inner") for line in out.splitlines())
    assert "leads out" in running.run("exec", "--cgroup", "../..", "c", "true").stderr


@pytest.mark.ferry
@pytest.mark.parametrize(("flag", "words"), [("--apparmor", "AppArmor"), ("--process-label", "SELinux")])
def test_exec_with_a_label_that_the_kernel_cannot_give(running: Oci, flag: str, words: str) -> None:
    done = running.run("exec", flag, "some-label", "c", "true")
    # Without the module that is said; with it, the kernel refuses a label that nobody loaded.
    assert done.returncode != 0 and (words in done.stderr or "some-label" in done.stderr), done


@pytest.mark.v2
def test_kill_all(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sh", "-c", "sleep 60 & sleep 60 & wait"), "c")
    wait_for(lambda: len(json.loads(oci.ok("ps", "--format", "json", "c"))) == 3, "three processes")
    oci.ok("kill", "--all", "c", "KILL")
    oci.wait_status("c", "stopped")
    oci.ok("delete", "c")


def test_run_keep(oci: Oci, bundles: BundleMaker) -> None:
    oci.ok("run", "--keep", "--no-new-keyring", "--no-subreaper", "--bundle", bundles("true"), "c")
    assert oci.status("c") == "stopped"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("state", "none"), "container does not exist"),
        (("start", "none"), "container does not exist"),
        (("exec", "none", "true"), "container does not exist"),
        (("kill", "none"), "container does not exist"),
        (("delete", "none"), "container does not exist"),
        (("pause", "none"), "container does not exist"),
        (("update", "--pids-limit", "5", "none"), "container does not exist"),
        (("start", "c"), "cannot start an already running container"),
    ],
)
def test_the_words_that_tools_match_on(running: Oci, args: tuple[str, ...], words: str) -> None:
    done = running.run(*args)
    assert done.returncode != 0 and words in done.stderr


def test_errors_in_a_json_log(oci: Oci, tmp_path: Path) -> None:
    oci.run("state", "none", before=("--log", str(tmp_path / "log"), "--log-format", "json"))
    entry = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert entry["level"] == "error" and "container does not exist" in entry["msg"] and entry["time"]


def test_sockets_are_passed_on(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """As systemd starts a service whose socket it holds."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    bundle = bundles("sh", "-c", "echo $LISTEN_FDS $LISTEN_PID; readlink /proc/self/fd/3")
    shell = 'exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
    argv = ["sh", "-c", shell, "sh", *oci.argv("run", "--bundle", bundle, "c")]
    out = subprocess.run(argv, stdin=listener, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert out[:2] == ["1", "1"] and out[2].startswith("socket:")


@pytest.mark.parametrize("verbs", ["run", "create"])
def test_readiness_reaches_systemd(oci: Oci, bundles: BundleMaker, tmp_path: Path, verbs: str) -> None:
    host = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    host.bind(str(tmp_path / "notify"))
    host.settimeout(20)
    # BusyBox has no client for datagram sockets: the host's Python stands in for a service.
    code = "import os,socket,time; s=socket.socket(1,2); s.connect(os.environ['NOTIFY_SOCKET']); s.send(b'STATUS=x'); s.send(b'READY=1'); time.sleep(60)"

    def change(config: dict[str, Any]) -> None:
        for directory in ("/usr", "/lib", "/lib64"):
            if Path(directory).exists():
                config["mounts"].append(
                    {"destination": directory, "type": "bind", "source": directory, "options": ["rbind", "ro"]}
                )

    bundle = bundles("/usr/bin/python3", "-Sc", code, change=change)
    env = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    null = subprocess.DEVNULL
    if verbs == "run":
        oci.ok("run", "-d", "--bundle", bundle, "c", env=env, stdout=null, stderr=null)
    else:
        oci.ok("create", "--bundle", bundle, "c", env=env, stdout=null, stderr=null)
        oci.ok("start", "c", env=env)
    received: list[bytes] = []
    threading.Thread(target=lambda: received.append(host.recv(4096)), daemon=True).start()
    wait_for(lambda: received, "READY=1 on the host")
    assert b"READY=1" in received[0].split(b"\n")


def test_features(oci: Oci) -> None:
    document = json.loads(oci.ok("features"))
    assert {"user", "mount", "pid", "network", "ipc", "uts", "cgroup"} <= set(document["linux"]["namespaces"])
    assert document["linux"]["seccomp"]["enabled"] and "SCMP_ACT_NOTIFY" in document["linux"]["seccomp"]["actions"]


def test_spec_writes_what_runs(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("true")
    (bundle / "config.json").unlink()
    oci.ok("spec", "--bundle", bundle)
    assert oci.run("spec", "--bundle", bundle).returncode == 1
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(terminal=False, args=["true"])
    (bundle / "config.json").write_text(json.dumps(config))
    oci.ok("run", "--bundle", bundle, "c")
