"""podman with the runtime under test as its runtime: what its users do all day."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import make_rootfs
from tests.helpers.leaks import Snapshot
from tests.helpers.oci import CRIU, OURS, SLOW_S, wait_for

IMAGE = "localhost/ferry-test"


class Podman:
    """podman with a storage and a state of its own below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{directory}/graph"\nrunroot = "{directory}/run"\n'
        )
        # Which limits a container can be given depends on the machine; systemd and a network of podman's own do, too.
        (directory / "containers.conf").write_text(
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\ntmp_dir = "{directory}/libpod"\n'
            f'[containers]\nnetns = "none"\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
        )
        runtime = os.environ.get("RUNTIME") or OURS
        self.runs_ours = runtime == OURS
        self._argv = ["podman", "--runtime", shutil.which(runtime) or runtime]
        self.env = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
            "CONTAINERS_CONF": str(directory / "containers.conf"),
            "PATH": f"{Path(CRIU).parent}:{os.environ['PATH']}",
        }

    def by(self, runtime: str) -> Podman:
        """Return the same podman with another runtime."""
        other = copy(self)
        other._argv = ["podman", "--runtime", runtime]
        return other

    def run(self, *args: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, **kwargs}
        return subprocess.run([*self._argv, *map(str, args)], env=self.env, text=True, timeout=90, check=False, **options)

    def ok(self, *args: str | Path, **kwargs: Any) -> str:
        done = self.run(*args, **kwargs)
        assert done.returncode == 0, f"podman {args}: status {done.returncode}: {done.stderr}"
        return (done.stdout or "").strip()

    def inspect(self, container: str, template: str) -> str:
        return self.ok("inspect", "--format", "{{" + template + "}}", container)


@pytest.fixture(scope="module")
def _podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    directory = tmp_path_factory.mktemp("podman")
    podman = Podman(directory)
    make_rootfs(directory / "rootfs")
    (directory / "rootfs/data").mkdir()
    tar = subprocess.run(["tar", "-C", directory / "rootfs", "-c", "."], capture_output=True, check=True).stdout
    subprocess.run(
        [*podman._argv, "import", "-", IMAGE], input=tar, env=podman.env, check=True, capture_output=True, timeout=SLOW_S
    )
    yield podman
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if str(directory) in line.split()[4]:
            subprocess.run(["umount", "-l", line.split()[4]], check=False)


@pytest.fixture
def podman(_podman: Podman) -> Iterator[Podman]:
    _podman.run("ps")  # podman makes its own cgroups and mounts at its first use
    before = Snapshot.take()
    yield _podman
    _podman.run("pod", "rm", "-a", "-f", "-t", "0")
    _podman.run("rm", "-a", "-f", "-t", "0")
    # runc leaves the directory of a pod in the trees that podman does not look after.
    left = [x for x in Snapshot.take().more_than(before) if "/libpod_parent" not in x or _podman.runs_ours]
    assert left == []


def test_run(podman: Podman) -> None:
    done = podman.run("run", "--rm", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_run_what_is_not_there(podman: Podman) -> None:
    assert podman.run("run", "--rm", IMAGE, "nothing").returncode == 127
    assert podman.run("run", "--rm", IMAGE, "/etc/passwd").returncode == 126
    # Only podman's own process knows: it finds the words of the runtime's error.
    assert "not found" in podman.run("run", "--rm", IMAGE, "nothing").stderr


def test_interactive(podman: Podman) -> None:
    out = podman.ok("run", "--rm", "-i", IMAGE, "cat", stdin=None, input="through")
    assert out == "through"


def test_terminal(podman: Podman) -> None:
    argv = " ".join([*podman._argv, "run", "--rm", "-it", IMAGE, "sh", "-c", "'tty; test -t 1 && echo is a terminal'"])
    done = subprocess.run(
        ["script", "-qec", argv, "/dev/null"], env=podman.env, capture_output=True, text=True, timeout=SLOW_S, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "/dev/pts/0" in done.stdout and "is a terminal" in done.stdout, done


def test_life_of_a_detached_container(podman: Podman) -> None:
    podman.ok(
        "run", "-d", "--name", "c", IMAGE, "sh", "-c", "trap 'exit 5' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"
    )
    assert podman.inspect("c", ".State.Status") == "running"
    wait_for(lambda: podman.ok("logs", "c").count("\n") > 2, "output")
    assert "sleep" in podman.ok("top", "c", "args")
    stats = json.loads(podman.ok("stats", "--no-stream", "--format", "json", "c"))[0]
    assert stats["name"] == "c" and int(stats["pids"]) >= 1
    podman.ok("pause", "c")
    assert podman.inspect("c", ".State.Status") == "paused"
    count = podman.ok("logs", "c")
    time.sleep(0.3)
    assert podman.ok("logs", "c") == count
    podman.ok("unpause", "c")
    wait_for(lambda: podman.ok("logs", "c") != count, "more output")
    podman.ok("kill", "--signal", "TERM", "c")
    assert podman.ok("wait", "c") == "5"
    assert podman.inspect("c", ".State.ExitCode") == "5"
    podman.ok("start", "c")
    podman.ok("stop", "-t", "5", "c")
    assert podman.inspect("c", ".State.Status") == "exited"
    podman.ok("rm", "c")


def test_exec(podman: Podman) -> None:
    podman.ok("run", "-d", "--name", "c", IMAGE, "sleep", "100")
    assert podman.ok("exec", "c", "sh", "-c", "echo $$; id -u").split()[1] == "0"
    assert podman.ok("exec", "--user", "1000:1000", "--env", "A=b", "--workdir", "/tmp", "c", "sh", "-c", "id -u; echo $A; pwd").split() == [
        "1000", "b", "/tmp",
    ]  # fmt: skip
    assert podman.ok("exec", "-i", "c", "cat", stdin=None, input="in") == "in"
    assert podman.run("exec", "c", "sh", "-c", "exit 9").returncode == 9
    assert podman.run("exec", "c", "nothing").returncode == 127
    podman.ok("exec", "-d", "c", "touch", "/detached")
    wait_for(lambda: podman.run("exec", "c", "test", "-e", "/detached").returncode == 0, "the detached exec")
    argv = " ".join([*podman._argv, "exec", "-it", "c", "tty"])
    done = subprocess.run(
        ["script", "-qec", argv, "/dev/null"], env=podman.env, capture_output=True, text=True, timeout=SLOW_S, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "/dev/pts/" in done.stdout, done


def cgroup_value(podman: Podman, v1: str, v2: str, *options: str) -> str:
    script = f"cat /sys/fs/cgroup/{v1} 2>/dev/null || cat /sys/fs/cgroup/{v2}"
    return podman.ok("run", "--rm", *options, IMAGE, "sh", "-c", script)


def test_limits(podman: Podman) -> None:
    assert cgroup_value(podman, "memory/memory.limit_in_bytes", "memory.max", "--memory", "64m") == "67108864"
    assert cgroup_value(podman, "pids/pids.max", "pids.max", "--pids-limit", "33") == "33"
    assert cgroup_value(podman, "cpu/cpu.cfs_quota_us", "cpu.max", "--cpus", "0.5").split()[0] == "50000"
    assert cgroup_value(podman, "cpuset/cpuset.cpus", "cpuset.cpus", "--cpuset-cpus", "0") == "0"


def test_confinement(podman: Podman) -> None:
    def status(*options: str) -> dict[str, str]:
        lines = podman.ok("run", "--rm", *options, IMAGE, "cat", "/proc/self/status").splitlines()
        return {line.split(":")[0]: line.split(":")[1].strip() for line in lines}

    default = status()
    assert default["Seccomp"] == "2" and default["NoNewPrivs"] == "0" and int(default["CapEff"], 16)
    assert int(status("--cap-drop", "ALL")["CapEff"], 16) == 0
    assert int(status("--cap-drop", "ALL", "--cap-add", "CHOWN")["CapEff"], 16) == 1
    assert status("--security-opt", "no-new-privileges")["NoNewPrivs"] == "1"
    assert status("--security-opt", "seccomp=unconfined")["Seccomp"] == "0"
    assert status("--user", "1000:1000")["Uid"].split()[0] == "1000"


def test_read_only_and_tmpfs(podman: Podman) -> None:
    script = "touch /x 2>&1; touch /scratch/y && echo written; grep ' /scratch ' /proc/self/mountinfo"
    out = podman.ok("run", "--rm", "--read-only", "--tmpfs", "/scratch:size=1m", IMAGE, "sh", "-c", script)
    assert "Read-only file system" in out and "written" in out and "size=1024k" in out


def test_volumes(podman: Podman, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v/in").write_text("from outside")
    assert podman.ok("run", "--rm", "-v", f"{tmp_path}/v:/v", IMAGE, "sh", "-c", "cat /v/in; echo back >/v/out") == "from outside"
    assert (tmp_path / "v/out").read_text() == "back\n"
    assert podman.run("run", "--rm", "-v", f"{tmp_path}/v:/v:ro", IMAGE, "touch", "/v/x").returncode == 1
    podman.ok("volume", "create", "vol")
    podman.ok("run", "--rm", "-v", "vol:/data", IMAGE, "sh", "-c", "echo kept >/data/f")
    assert podman.ok("run", "--rm", "-v", "vol:/data", IMAGE, "cat", "/data/f") == "kept"
    podman.ok("volume", "rm", "vol")


def test_device(podman: Podman) -> None:
    assert (
        podman.ok("run", "--rm", "--device", "/dev/zero:/dev/nought", IMAGE, "sh", "-c", "head -c 4 /dev/nought | wc -c") == "4"
    )


def test_user_namespace(podman: Podman) -> None:
    out = podman.ok(
        "run",
        "--rm",
        "--uidmap",
        "0:200000:65536",
        "--gidmap",
        "0:200000:65536",
        IMAGE,
        "sh",
        "-c",
        "id -u; cat /proc/self/uid_map",
    )
    assert out.split() == ["0", "0", "200000", "65536"]


def test_init(podman: Podman) -> None:
    assert "podman-init" in podman.ok("run", "--rm", "--init", IMAGE, "cat", "/proc/1/cmdline")


def test_hostname_env_workdir_entrypoint(podman: Podman) -> None:
    out = podman.ok(
        "run", "--rm", "--hostname", "h1", "--env", "A=b", "--workdir", "/tmp", "--entrypoint", "/bin/sh", IMAGE,
        "-c", "hostname; echo $A; pwd",
    )  # fmt: skip
    assert out.split() == ["h1", "b", "/tmp"]


def test_health_check(podman: Podman) -> None:
    podman.ok(
        "run", "-d", "--name", "c", "--health-cmd", "test -e /healthy", "--health-interval", "disable", IMAGE, "sleep", "100"
    )
    assert podman.run("healthcheck", "run", "c").returncode == 1
    podman.ok("exec", "c", "touch", "/healthy")
    assert podman.run("healthcheck", "run", "c").returncode == 0


def test_pod_with_shared_namespaces(podman: Podman) -> None:
    if not shutil.which("catatonit"):
        pytest.fail("catatonit is not installed: scripts/install-packages")
    podman.ok("pod", "create", "--name", "p", "--share", "ipc,uts,net", "--infra-image", IMAGE, "--infra-command", "/bin/sleep 1000",
              "--network", "none", "--hostname", "podhost")  # fmt: skip
    podman.ok("run", "-d", "--pod", "p", "--name", "a", IMAGE, "sh", "-c", "touch /dev/shm/shared; exec sleep 100")
    out = podman.ok("run", "--rm", "--pod", "p", IMAGE, "sh", "-c", "hostname; ls /dev/shm; readlink /proc/self/ns/net")
    assert out.split()[:2] == ["podhost", "shared"]
    assert podman.ok("exec", "a", "readlink", "/proc/self/ns/net") == out.split()[2]
    podman.ok("pod", "pause", "p")
    podman.ok("pod", "unpause", "p")
    podman.ok("pod", "rm", "-f", "-t", "0", "p")


COUNT = "i=0; while :; do i=$((i+1)); echo $i >>/data/count; sleep 0.05; done"


def numbers(podman: Podman, container: str) -> list[int]:
    return [int(n) for n in podman.ok("exec", container, "cat", "/data/count").split()]


def test_checkpoint_and_restore(podman: Podman) -> None:
    podman.ok("run", "-d", "--name", "c", IMAGE, "sh", "-c", COUNT)
    wait_for(lambda: podman.run("exec", "c", "test", "-s", "/data/count").returncode == 0, "a count")
    podman.ok("container", "checkpoint", "--leave-running", "c")
    assert podman.inspect("c", ".State.Status") == "running"
    podman.ok("container", "checkpoint", "c")
    assert podman.inspect("c", ".State.Status") == "exited" and podman.inspect("c", ".State.Checkpointed") == "true"
    podman.ok("container", "restore", "c")
    before = numbers(podman, "c")
    wait_for(lambda: len(numbers(podman, "c")) > len(before), "the count going on")
    found = numbers(podman, "c")
    assert found == list(range(1, len(found) + 1))


def test_checkpoint_exported_and_imported(podman: Podman, tmp_path: Path) -> None:
    podman.ok("run", "-d", "--name", "c", IMAGE, "sh", "-c", COUNT)
    wait_for(lambda: podman.run("exec", "c", "test", "-s", "/data/count").returncode == 0, "a count")
    podman.ok("container", "checkpoint", "--tcp-established", "--export", tmp_path / "c.tar.zst", "c")
    podman.ok("rm", "-f", "c")
    podman.ok("container", "restore", "--tcp-established", "--import", tmp_path / "c.tar.zst")
    before = numbers(podman, "c")
    wait_for(lambda: len(numbers(podman, "c")) > len(before), "the count going on")
    found = numbers(podman, "c")
    assert found == list(range(1, len(found) + 1))
