"""Every step of `create`, `start` and `exec` fails once: the kernel refuses the n-th call of a kind, or kills who makes it.

strace injects the faults, so the runtime that is tested is the one that is shipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runtime.linux.procfs import Stat, read_stat
from tests.helpers.bundle import BundleMaker
from tests.helpers.leaks import Snapshot
from tests.helpers.oci import Oci, wait_for

pytestmark = pytest.mark.ferry

# call -> every how many-th of them is tried; of calls that are many and alike not all
CREATE = {
    "mount": 2, "umount2": 1, "pivot_root": 1, "move_mount": 4, "mount_setattr": 2, "open_tree": 4, "openat2": 13, "mkdir": 3,
    "mkdirat": 3, "mknodat": 3, "symlinkat": 3, "fchownat": 3, "sethostname": 1, "clone": 1, "unshare": 1, "setresuid": 1, "setgroups": 1,
    "capset": 1, "prctl": 9, "fsync": 1, "rename": 1, "bind": 1, "listen": 1, "sendmsg": 1, "flock": 1, "socketpair": 1,
}  # fmt: skip

ENDED = Stat(0, "X", 0, 0)


class Strace:
    def __init__(self, oci: Oci, log: Path) -> None:
        self._oci, self._log = oci, log

    def run(self, call: str, fault: str, number: int, *args: str | Path) -> tuple[subprocess.CompletedProcess[str], bool]:
        """Run a verb with a fault at the n-th call; say whether it came to that."""
        # With -D it is the verb that is our child: strace would wait for the container's process, too.
        argv = [
            "strace",
            "-I2",
            "-D",
            "-f",
            "-o",
            str(self._log),
            "-e",
            f"trace={call}",
            "-e",
            f"inject={call}:{fault}:when={number}",
        ]
        self._log.unlink(missing_ok=True)
        with self._log.with_suffix(".err").open("w+") as err:
            null = subprocess.DEVNULL
            verb = subprocess.Popen([*argv, *self._oci.argv(*args)], stdin=null, stdout=null, stderr=err)
            verb.wait(timeout=60)
            err.seek(0)
            text = err.read()
        ended = re.compile(rf"^{verb.pid} +\+\+\+", re.MULTILINE)  # short numbers are padded
        wait_for(lambda: ended.search(self._text()), "strace's last word on the verb")
        self._let_go()
        struck = "INJECTED" in self._text() or "+++ killed by SIGKILL" in self._text()
        return subprocess.CompletedProcess(verb.args, verb.returncode, "", text), struck

    def _text(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _let_go(self) -> None:
        """Have strace leave the container's process."""
        for state in self._oci.root.glob("*/state.json"):
            pid = json.loads(state.read_text())["pid"]
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                tracer = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("TracerPid:"))
                if tracer:
                    os.kill(tracer, signal.SIGTERM)
                    wait_for(lambda t=tracer: (read_stat(t) or ENDED).state in "ZX", "the end of strace")


@pytest.fixture
def strace(oci: Oci, tmp_path: Path) -> Strace:
    return Strace(oci, tmp_path / "strace")


def gone(oci: Oci) -> bool:
    return not oci.root.exists() or not [p for p in oci.root.iterdir() if not p.name.startswith(".")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", ["error=EIO", "signal=KILL"])
@pytest.mark.parametrize("call", CREATE)
def test_every_step_of_create(oci: Oci, strace: Strace, bundles: BundleMaker, call: str, fault: str) -> None:
    bundle = bundles("sleep", "60")
    before, number, tried = Snapshot.take(), 1, 0
    while True:
        done, struck = strace.run(call, fault, number, "create", "--bundle", bundle, "c")
        if not struck:
            break
        tried += 1
        where = f"{call} {number} {fault}: {done.stderr}"
        assert "Traceback" not in done.stderr, where
        if fault.startswith("error"):
            # Refused: all is undone. A few faults are survived, such as that of a link that is there already.
            if done.returncode == 0:
                assert oci.status("c") == "created", where
                oci.ok("delete", "--force", "c")
            else:
                assert "level=error" in done.stderr, where
        # A verb that was killed leaves its container's state, which says so; one whose child was killed cleans up.
        if not gone(oci):
            assert done.returncode < 0 or done.returncode == 137, where
            assert oci.status("c") in ("creating", "created", "stopped"), where
            oci.ok("delete", "--force", "c")
        assert gone(oci), where
        assert Snapshot.take().more_than(before) == [], where
        number += CREATE[call]
    assert done.returncode == 0, done.stderr
    assert tried or call in ("mkdir", "setgroups", "unshare"), f"{call} is never made"
    oci.ok("delete", "--force", "c")


@pytest.mark.parametrize("fault", ["error=EIO", "signal=KILL"])
@pytest.mark.parametrize("call", ["connect", "sendmsg", "flock", "unlink"])
def test_every_step_of_start(oci: Oci, strace: Strace, bundles: BundleMaker, call: str, fault: str) -> None:
    bundle, number = bundles("sleep", "60"), 1
    null = subprocess.DEVNULL
    while True:
        oci.ok("create", "--bundle", bundle, "c", stdout=null, stderr=null)
        done, struck = strace.run(call, fault, number, "start", "c")
        assert "Traceback" not in done.stderr
        program = Path(f"/proc/{oci.state('c')['pid']}/cmdline").read_bytes().startswith(b"sleep")
        assert oci.status("c") == ("running" if program else "created")
        oci.ok("delete", "--force", "c")
        if not struck:
            break
        number += 1


@pytest.mark.parametrize("fault", ["error=EIO", "signal=KILL"])
@pytest.mark.parametrize("call", ["setns", "setresuid", "capset", "clone", "sendmsg", "execve"])
def test_every_step_of_exec(oci: Oci, strace: Strace, bundles: BundleMaker, call: str, fault: str) -> None:
    """Whatever happens to an exec, the container runs on, and no process of the exec's stays."""
    oci.detached(bundles("sleep", "60"), "c")
    pid, number = oci.state("c")["pid"], 2 if call == "execve" else 1  # the first is strace's own
    while True:
        done, struck = strace.run(call, fault, number, "exec", "c", "true")
        assert "Traceback" not in done.stderr
        if not struck:
            break
        assert done.returncode != 0
        assert oci.status("c") == "running" and oci.state("c")["pid"] == pid
        wait_for(lambda: oci.ok("ps", "--format", "json", "c").strip() == f"[{pid}]", "the end of the exec's process")
        number += 1


def test_a_full_state_directory(oci: Oci, bundles: BundleMaker) -> None:
    """No space for the state: nothing is made."""
    oci.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=3", "none", oci.root], check=True)
    try:
        before = Snapshot.take()
        done = oci.run("create", "--bundle", bundles("sleep", "60"), "c")
        assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr
        assert gone(oci) and Snapshot.take().more_than(before) == []
    finally:
        subprocess.run(["umount", oci.root], check=True)


def test_a_read_only_state_directory(bundles: BundleMaker, tmp_path: Path) -> None:
    root = tmp_path / "ro"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", root], check=True)
    try:
        done = Oci(root / "state").run("create", "--bundle", bundles("true"), "c")
        assert done.returncode == 1 and str(root) in done.stderr and "Read-only" in done.stderr
    finally:
        subprocess.run(["umount", root], check=True)


def environment_without_home() -> dict[str, Any]:
    return {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME")}


def test_an_empty_environment(oci: Oci, bundles: BundleMaker) -> None:
    oci.ok("run", "--bundle", bundles("true"), "c", env={})
    oci.ok("run", "--bundle", bundles("true"), "c", env=environment_without_home())
