"""Whatever goes wrong: a clear error, a documented exit code, it still runs on the source, the target keeps nothing."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_move import BUNDLE, NAME, count, make, runs_on
from tests.helpers.bed import BUNDLES, NO_REMAINS, Bed
from tests.helpers.bundle import assert_gapless, numbers
from tests.helpers.cpu import of_everything
from tests.helpers.oci import wait_for
from tests.helpers.stopped import Stopped

REFUSED, ROLLED_BACK, IN_DOUBT = 3, 4, 5
PHASES = ("prepare", "precopy", "freeze", "ship", "restore")


@pytest.fixture
def counting(bed: Bed) -> Iterator[Bed]:
    make(bed)
    before = _target(bed)
    yield bed
    assert _target(bed) == before, "the target keeps something"
    assert not list(bed.path("host1", "/var/lib/ferry").glob("*.2*")), "the source keeps something"
    left = bed.ok("host1", "sh", "-c", "cd /run/ferry/migrate 2>/dev/null && find . -type f -o -mindepth 1 -type d; true").split()
    assert set(left) <= {"./locks", "./slots"}, left


def _target(bed: Bed) -> dict[str, list[str]]:
    found = bed.inventory("host2")
    found["FILES"] = [f for f in found["FILES"] if f not in NO_REMAINS]
    del found["PROCESSES"]
    containers = bed.ok("host2", "runtime", "list", "--quiet").split()
    return {**found, "CONTAINERS": containers}


def _fails(
    bed: Bed, status: int, *words: str, options: tuple[str, ...] = (), host: str = "host2", container: str = NAME
) -> dict[str, Any]:
    done = bed.run("host1", "migrate", "move", "--json", *options, container, host)
    assert done.returncode == status, f"status {done.returncode}: {done.stdout}{done.stderr}"
    report: dict[str, Any] = json.loads(done.stdout)
    text = f"{report['error']['message']} {report['error']['hint']}"
    for word in words:
        assert word in text, text
    assert report["outcome"] == {REFUSED: "REFUSED", ROLLED_BACK: "ROLLED_BACK", IN_DOUBT: "IN_DOUBT"}[status]
    return report


def test_container_unknown(counting: Bed) -> None:
    _fails(counting, REFUSED, "container does not exist: nothing", container="nothing")
    runs_on(counting, "host1")


def test_already_there(counting: Bed) -> None:
    counting.ok("host2", "runtime", "spec", "--bundle", "/tmp")
    counting.ok(
        "host2", "sh", "-c", "mkdir -p /tmp/rootfs/bin && cp /bin/busybox /tmp/rootfs/bin/ && ln -s busybox /tmp/rootfs/bin/sh"
    )
    counting.ok("host2", "sh", "-c", 'sed -i \'s/"terminal": true/"terminal": false/\' /tmp/config.json')
    counting.ok("host2", "sh", "-c", f"runtime create --bundle /tmp {NAME} </dev/null >/dev/null 2>&1")
    _fails(counting, REFUSED, f"has a container {NAME} already", "container-exists")
    counting.ok("host2", "runtime", "delete", "--force", NAME)
    counting.ok("host2", "sh", "-c", "rm -rf /tmp/rootfs /tmp/config.json")
    runs_on(counting, "host1")


def test_its_bundle_is_there(counting: Bed) -> None:
    counting.ok("host2", "mkdir", "-p", BUNDLE)
    _fails(counting, REFUSED, BUNDLE, "bundle-exists")
    counting.ok("host2", "rm", "-r", BUNDLES)
    runs_on(counting, "host1")


def test_paused(counting: Bed) -> None:
    counting.ok("host1", "runtime", "pause", NAME)
    _fails(counting, REFUSED, "is paused", "runtime resume")
    assert counting.status("host1", NAME) == "paused"
    counting.ok("host1", "runtime", "resume", NAME)
    runs_on(counting, "host1")


def test_stopped(counting: Bed) -> None:
    counting.ok("host1", "runtime", "kill", NAME, "KILL")
    wait_for(lambda: counting.status("host1", NAME) == "stopped", "the end")
    _fails(counting, REFUSED, "is stopped, not running")


def test_to_the_same_host(counting: Bed) -> None:
    _fails(counting, REFUSED, "same-host", host="host1")
    runs_on(counting, "host1")


@pytest.mark.parametrize(("host", "words"), [("nowhere", "nowhere: cannot connect"), ("-oProxyCommand=x", "is no host name")])
def test_host_unknown(counting: Bed, host: str, words: str) -> None:
    done = counting.run("host1", "migrate", "move", "--json", "--", NAME, host)
    assert done.returncode == REFUSED and words in json.loads(done.stdout)["error"]["message"], done.stdout
    runs_on(counting, "host1")


def _ssh_config(bed: Bed, text: str) -> Path:
    path = bed.path("host1", "/var/lib/root/.ssh/config")
    path.write_text(text)
    return path


@pytest.fixture
def ssh_config(counting: Bed) -> Iterator[Callable[[str], Path]]:
    yield lambda text: _ssh_config(counting, text)
    counting.path("host1", "/var/lib/root/.ssh/config").unlink(missing_ok=True)


def test_names_come_from_ssh_config(counting: Bed, ssh_config: Callable[[str], Path]) -> None:
    key = counting.path("host1", "/var/lib/root/.ssh/id_ed25519")
    key.rename(key.with_name("other"))
    ssh_config("Host far\n HostName 198.51.100.2\n User root\n IdentityFile ~/.ssh/other\n")
    try:
        counting.move("host1", NAME, "far")
        runs_on(counting, "host2")
        counting.move("host2", NAME, "host1")
    finally:
        key.with_name("other").rename(key)
    runs_on(counting, "host1")


def test_host_refuses(counting: Bed, ssh_config: Callable[[str], Path]) -> None:
    ssh_config("Host host2\n Port 2\n")
    _fails(counting, REFUSED, "cannot connect to host2 port 2: Connection refused")
    runs_on(counting, "host1")


def test_host_lets_nobody_in(counting: Bed, ssh_config: Callable[[str], Path]) -> None:
    key = counting.path("host1", "/var/lib/root/.ssh/stranger")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    ssh_config("Host host2\n IdentityFile ~/.ssh/stranger\n")
    _fails(counting, REFUSED, "user root was not let in")
    key.unlink()
    key.with_suffix(".pub").unlink()
    runs_on(counting, "host1")


def test_host_key_unknown(counting: Bed, ssh_config: Callable[[str], Path]) -> None:
    ssh_config("Host host2\n UserKnownHostsFile /dev/null\n StrictHostKeyChecking no\n")
    _fails(counting, REFUSED, "host key is not known", "ssh host2")
    runs_on(counting, "host1")


def test_host_key_changed(counting: Bed) -> None:
    known = counting.path("host1", "/var/lib/root/.ssh/known_hosts")
    whole = known.read_text()
    other = subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(known.parent / "x")], check=False)
    assert other.returncode == 0
    kind, key, _ = (known.parent / "x.pub").read_text().split(" ", 2)
    known.write_text(f"host2,198.51.100.2 {kind} {key}\n")
    try:
        _fails(counting, REFUSED, "host key has changed", "ssh-keygen -R")
    finally:
        known.write_text(whole)
        (known.parent / "x").unlink()
        (known.parent / "x.pub").unlink()
    runs_on(counting, "host1")


def test_host_without_ferry(counting: Bed) -> None:
    _fails(counting, REFUSED, "no Ferry agent could be started", "No such file", options=("--remote-command", "/no/migrate"))
    _fails(counting, REFUSED, "what answered is no Ferry agent", options=("--remote-command", "echo hello there; :"))
    runs_on(counting, "host1")


def test_host_without_runtime(counting: Bed) -> None:
    _fails(
        counting, REFUSED, "target-runtime", "/no/runtime", options=("--remote-command", "env FERRY_RUNTIME=/no/runtime migrate")
    )
    runs_on(counting, "host1")


def test_host_without_criu(counting: Bed) -> None:
    _fails(counting, REFUSED, "target-criu", "/no/criu", options=("--remote-command", "env FERRY_CRIU=/no/criu migrate"))
    runs_on(counting, "host1")


def test_host_with_an_unfit_criu(counting: Bed) -> None:
    _fails(counting, REFUSED, "target-criu", options=("--remote-command", "env FERRY_CRIU=/bin/false migrate"))
    runs_on(counting, "host1")


def test_what_cannot_be_checkpointed_is_found_before(counting: Bed) -> None:
    counting.run(
        "host1", "runtime", "exec", "--detach", NAME, "sleep", "100", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _fails(counting, REFUSED, "exec-session", "(sleep) was started by exec")
    runs_on(counting, "host1")


def test_output_to_a_file_of_the_host(counting: Bed) -> None:
    counting.ok("host1", "runtime", "delete", "--force", NAME)
    counting.ok("host1", "sh", "-c", f"runtime run --detach --bundle {BUNDLE} {NAME} </dev/null >/tmp/out 2>&1")
    _fails(counting, REFUSED, "file-outside", "/tmp/out")
    assert counting.status("host1", NAME) == "running"
    counting.ok("host1", "rm", "/tmp/out")


def test_a_processor_that_lacks_something(counting: Bed) -> None:
    image = base64.b64decode(counting.ok("host1", "runtime", "cpu", "dump"))
    richer = base64.b64encode(of_everything(image)).decode()
    wrapper = f"""#!/bin/sh\ncase "$*" in *"cpu dump"*) echo {richer} ;; *) exec runtime "$@" ;; esac\n"""
    (counting.path("host1", "/var/lib") / "runtime").write_text(wrapper)
    (counting.path("host1", "/var/lib") / "runtime").chmod(0o755)
    done = counting.run("host1", "env", "FERRY_RUNTIME=/var/lib/runtime", "migrate", "check", NAME, "host2")
    assert done.returncode == REFUSED and "fail cpu " in done.stdout and "capabilities do not match" in done.stdout
    assert counting.run("host1", "migrate", "check", NAME, "host2").returncode == 0
    runs_on(counting, "host1")


def test_no_space_is_found_before(counting: Bed) -> None:
    counting.ok("host2", "sh", "-c", f"mkdir -p {BUNDLES} && mount -t tmpfs -o size=4m small {BUNDLES}")
    try:
        _fails(counting, REFUSED, "target-space-bundle", "MiB free")
    finally:
        counting.ok("host2", "sh", "-c", f"umount {BUNDLES} && rmdir {BUNDLES}")
    runs_on(counting, "host1")


def _stopped(bed: Bed, entry: str, *options: str) -> Stopped:
    """Return a move that has stopped itself at an entry of its journal, for the test to break something."""
    move = Stopped(bed, "host1", entry, "migrate", "move", "--json", *options, NAME, "host2")
    assert not move.ended, move.go_on()
    return move


def _go_on(move: Stopped) -> tuple[int, dict[str, Any]]:
    status, out, err = move.go_on()
    assert out, (status, err)
    return status, json.loads(out)


def _cut_ssh(bed: Bed) -> None:
    """Kill host2's ends of all SSH connections; its sshd goes on."""
    sessions = [
        int(p)
        for p in bed.ok("host2", "sh", "-c", "ps -eo pid=,args= | awk '$2 == \"sshd:\" && $3 ~ /^root/ {print $1}'").split()
    ]
    assert sessions, "there is no connection to cut"
    bed.ok("host2", "sh", "-c", f"kill -9 {' '.join(map(str, sessions))}")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("moment", ["intent:after", "result:after"])
def test_ssh_is_lost(counting: Bed, phase: str, moment: str) -> None:
    if (phase, moment) == ("prepare", "intent:after"):
        moment = "intent:before"
    move = _stopped(counting, f"{phase}.{moment}")
    _cut_ssh(counting)
    status, report = _go_on(move)
    assert (status, report["outcome"]) == (ROLLED_BACK, "ROLLED_BACK"), report
    assert "lost" in report["error"]["message"] or "no Ferry agent" in report["error"]["message"], report["error"]
    runs_on(counting, "host1")


def test_ssh_is_lost_after_the_decision(counting: Bed) -> None:
    """The target is prepared, and waits: it is told over a new connection."""
    move = _stopped(counting, "commit.decided:after")
    _cut_ssh(counting)
    status, report = _go_on(move)
    assert (status, report["outcome"], report["settled"]) == (0, "COMPLETED", True), report
    assert report["recovered"]["code"] == "connection-lost"
    runs_on(counting, "host2")
    counting.move("host2", NAME, "host1")


def test_ssh_is_lost_after_the_release(counting: Bed) -> None:
    """It runs on the target: the move goes forward, whatever cannot be asked any more."""
    move = _stopped(counting, "commit.released:before")
    _cut_ssh(counting)
    status, report = _go_on(move)
    assert (status, report["outcome"]) == (0, "COMPLETED"), report
    runs_on(counting, "host2")
    counting.move("host2", NAME, "host1")


@pytest.mark.timeout(400)
def test_the_network_is_gone_for_good(counting: Bed) -> None:
    move = _stopped(counting, "freeze.intent:after")
    counting.ok("host2", "ip", "link", "set", "eth0", "down")
    try:
        status, report = _go_on(move)
        assert (status, report["outcome"]) == (ROLLED_BACK, "ROLLED_BACK"), report
        at = numbers(count(counting, "host1"))
        wait_for(lambda: len(numbers(count(counting, "host1"))) > len(at), "counting on host1")
        assert_gapless(numbers(count(counting, "host1")))
    finally:
        counting.ok("host2", "ip", "link", "set", "eth0", "up")
    # The target finds out by itself, when it has heard nothing for a while.
    wait_for(
        lambda: counting.status("host2", NAME) is None and not counting.path("host2", BUNDLE).exists(), "the target's end", 90
    )
    _fails(counting, REFUSED, "move-unfinished", "migrate recover")
    assert "ROLLED_BACK" in counting.ok("host1", "migrate", "recover")
    assert json.loads(counting.ok("host1", "migrate", "status", "--json")) == {"moves": []}
    runs_on(counting, "host1")


@pytest.mark.parametrize(("entry", "place"), [("precopy.intent:after", BUNDLES), ("freeze.intent:after", "/run/ferry/migrate")])
def test_the_targets_disk_fills_up(counting: Bed, entry: str, place: str) -> None:
    counting.ok("host2", "sh", "-c", f"mkdir -p {place} && mount -t tmpfs -o size=64m small {place}")
    try:
        move = _stopped(counting, entry)
        counting.run("host2", "sh", "-c", f"dd if=/dev/zero of={place}/filler bs=4096 2>/dev/null; echo x >>{place}/filler")
        status, report = _go_on(move)
        assert (status, report["outcome"]) == (ROLLED_BACK, "ROLLED_BACK"), report
        assert "No space left on device" in report["error"]["message"] + str(report["undo_errors"])
    finally:
        time.sleep(0.2)
        counting.ok("host2", "sh", "-c", f"umount {place} && rmdir {place}")
    runs_on(counting, "host1")


@pytest.mark.parametrize("phase", [*PHASES, "commit"])
def test_interrupted(counting: Bed, phase: str) -> None:
    """^C before the decision rolls back; after it, the move goes forward."""
    move = _stopped(counting, "commit.decided:after" if phase == "commit" else f"{phase}.intent:after")
    os.kill(move.pid, signal.SIGINT)
    status, report = _go_on(move)
    if phase == "commit":
        assert (status, report["outcome"]) == (0, "COMPLETED"), report
        runs_on(counting, "host2")
        counting.move("host2", NAME, "host1")
        return
    assert (status, report["outcome"]) == (ROLLED_BACK, "ROLLED_BACK"), report
    assert "interrupted" in report["error"]["message"]
    runs_on(counting, "host1")


def test_two_moves_at_once(counting: Bed) -> None:
    first = _stopped(counting, "freeze.intent:before")
    _fails(counting, REFUSED, "is being moved already")
    status, _ = _go_on(first)
    assert status == 0
    runs_on(counting, "host2")
    counting.move("host2", NAME, "host1")


CONNECTING = "sleep 1000 | nc -l -p 77 & while ! test -e /connect; do sleep 0.02; done; sleep 1000 | nc 127.0.0.1 77"


def _connect(bed: Bed) -> None:
    """Have the container make its connection, to itself."""
    (bed.path("host1", BUNDLE) / "rootfs/connect").touch()
    tables = f"/proc/{json.loads(bed.ok('host1', 'runtime', 'state', NAME))['pid']}/net/tcp"
    established = " 01 "
    wait_for(lambda: established in bed.ok("host1", "cat", tables), "the connection", 30)


def test_what_cannot_be_dumped_is_found_before(bed: Bed) -> None:
    make(bed, "sh", "-c", CONNECTING)
    _connect(bed)
    _fails(bed, REFUSED, "an open TCP connection", "tcp-established")
    assert bed.status("host1", NAME) == "running" and bed.status("host2", NAME) is None


def test_a_dump_that_criu_refuses(bed: Bed) -> None:
    """The connection is made when the preflight is over."""
    make(bed, "sh", "-c", CONNECTING)
    stopped = _stopped(bed, "prepare.result:after")
    _connect(bed)
    status, report = _go_on(stopped)
    assert status == ROLLED_BACK and report["undo_errors"] == []
    text = f"{report['error']['message']} {report['error']['hint']}"
    assert "Connected TCP socket" in text and "[tcp-established]" in text
    assert bed.status("host1", NAME) == "running" and bed.status("host2", NAME) is None
    bed.move("host1", NAME, "host2", "--tcp-established")
    assert bed.status("host2", NAME) == "running"


def test_a_restore_that_fails_on_the_target(bed: Bed, tmp_path: Path) -> None:
    """A bind mount's source is another kind of file there: found by CRIU only; the source runs on."""
    path = bed.path("host1", BUNDLE)
    from tests.helpers.bundle import BundleMaker, counter

    for host, command in (("host1", "mkdir -p /tmp/shared"), ("host2", "touch /tmp/shared")):
        bed.ok(host, "sh", "-c", command)
    mount = {"destination": "/shared", "type": "bind", "source": "/tmp/shared", "options": ["rbind"]}
    bundle = BundleMaker(path.parent)(*counter(), path=path, change=lambda c: c["mounts"].append(mount))
    (bundle / "rootfs/shared").mkdir()
    bed.start("host1", BUNDLE, NAME)
    wait_for(lambda: len(numbers(bundle / "rootfs/count")) > 3, "counting")
    _fails(bed, ROLLED_BACK, "criu restore failed")
    runs_on(bed, "host1")
    for host in ("host1", "host2"):
        bed.ok(host, "rm", "-rf", "/tmp/shared")
