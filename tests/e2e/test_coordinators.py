"""The coordinator on the source, on the target, or beside them; what is left when it is killed, and how it is ended."""

from __future__ import annotations

import json
import signal
import subprocess

from tests.e2e.test_move import NAME, make, runs_on
from tests.helpers.bed import Bed
from tests.helpers.oci import wait_for
from tests.helpers.stopped import Stopped


def test_pull(bed: Bed) -> None:
    """The data goes through the coordinator's connection, which is the target's own."""
    make(bed)
    done = bed.run("host2", "migrate", "pull", "--json", NAME, "host1")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["source"], report["target"]) == ("host1", "host2")
    assert report["details"]["prepare"]["data"] == "through the coordinator"
    runs_on(bed, "host2")
    for host, role in (("host1", "source"), ("host2", "target")):
        (move,) = json.loads(bed.ok(host, "migrate", "history", "--json"))["moves"]
        assert (move["role"], move["outcome"], move["open"]) == (role, "COMPLETED", False)
    assert json.loads(bed.ok("host2", "migrate", "history", "--from", "host1", report["migration_id"]))["outcome"] == "COMPLETED"


def test_a_coordinator_that_reaches_both_by_ssh(bed: Bed) -> None:
    make(bed)
    findings = json.loads(bed.ok("host2", "migrate", "check", "--json", "--from", "host1", NAME, "host2"))["findings"]
    assert "data-direct" in {f["code"] for f in findings}
    done = bed.run("host2", "migrate", "move", "--json", "--from", "host1", NAME, "host2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["details"]["prepare"]["data"] == "direct"
    runs_on(bed, "host2")


def test_a_coordinator_that_is_killed_after_the_decision(bed: Bed) -> None:
    """The target waits, held; both hosts know of the move; recovery releases it."""
    make(bed)
    move = Stopped(bed, "host1", "commit.decided:after", "migrate", "move", NAME, "host2")
    move.signal(signal.SIGKILL)
    move.go_on()
    (here,) = json.loads(bed.ok("host1", "migrate", "status", "--json"))["moves"]
    assert bed.status("host1", NAME) == "paused" and bed.status("host2", NAME) == "paused"
    refused = bed.run("host1", "migrate", "move", NAME, "host2")
    assert refused.returncode == 3 and f"migrate recover {here['migration_id']}" in refused.stderr
    assert f"{here['migration_id']}: COMPLETED" in bed.ok("host1", "migrate", "recover")
    runs_on(bed, "host2")
    assert bed.ok("host1", "migrate", "recover").strip() == "nothing is left to recover"


def test_abort(bed: Bed) -> None:
    make(bed)
    move = Stopped(bed, "host1", "freeze.intent:before", "migrate", "move", "--json", NAME, "host2")
    (row,) = json.loads(bed.ok("host1", "migrate", "status", "--json"))["moves"]
    assert row["state"] == "under way"
    abort = subprocess.Popen(bed.argv("host1", "migrate", "abort", row["migration_id"]), stdout=subprocess.PIPE, text=True)
    request = f"/run/ferry/migrate/{row['migration_id']}/stop"
    wait_for(lambda: bed.run("host1", "test", "-e", request).returncode == 0, "the request", 30)
    status, out, _ = move.go_on()
    assert (status, json.loads(out)["error"]["code"]) == (4, "stopped")
    assert abort.communicate(timeout=60)[0] == f"{row['migration_id']}: ROLLED_BACK\n" and abort.returncode == 0
    runs_on(bed, "host1")


def test_what_may_be_repeated_is(bed: Bed) -> None:
    """Every verb that the agents' table calls repeatable is asked twice: in a move, and in the recovery of one that was decided."""
    make(bed)
    twice = "FERRY_FAULT_TWICE=1"
    done = bed.run("host1", "env", twice, "migrate", "move", NAME, "host2")
    assert done.returncode == 0, done.stderr
    runs_on(bed, "host2")
    for at, runs in (("restore.result:after", "host2"), ("commit.decided:after", "host1")):
        move = Stopped(bed, "host2", at, "migrate", "move", NAME, "host1")
        move.signal(signal.SIGKILL)
        move.go_on()
        bed.ok("host2", "env", twice, "migrate", "recover")
        runs_on(bed, runs)
