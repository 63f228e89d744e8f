"""The hold: what the container is, and may become, at every moment between the two answers. On the real CRIU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.bundle import BundleMaker, assert_gapless, counter, numbers
from tests.helpers.oci import Oci, wait_for

pytestmark = pytest.mark.ferry


class Hold:
    """A held verb and the test as its controller."""

    def __init__(self, oci: Oci, *args: str | Path) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(30)
        null = subprocess.DEVNULL
        argv = oci.argv(*args[:1], "--hold", "--control-fd", str(theirs.fileno()), *args[1:], "c")
        self.process = subprocess.Popen(argv, pass_fds=(theirs.fileno(),), stdin=null, stdout=null, stderr=null)
        theirs.close()
        self._file = self.sock.makefile("r")
        oci.at_end.append(self.close)

    def event(self) -> str:
        line = self._file.readline()
        return str(json.loads(line)["event"]) if line else "EOF"

    def say(self, word: str) -> None:
        self.sock.sendall(word.encode() + b"\n")

    def close(self) -> int:
        """Go away, and return the verb's exit status. Idempotent."""
        self._file.close()
        self.sock.close()
        return self.process.wait(30)


class Case:
    def __init__(self, oci: Oci, bundle: Path, images: Path) -> None:
        self.oci, self.bundle, self.images = oci, bundle, images
        self.count = bundle / "rootfs/count"

    def checkpoint(self, *options: str) -> Hold:
        hold = Hold(self.oci, "checkpoint", "--image-path", self.images, *options)
        assert hold.event() == "ready"
        self.runs()
        hold.say("go")
        assert [hold.event(), hold.event()] == ["frozen", "held"]
        self.stands_still()
        return hold

    def restore(self) -> Hold:
        hold = Hold(self.oci, "restore", "--detach", "--image-path", self.images, "--bundle", self.bundle)
        assert hold.event() == "ready"
        hold.say("go")
        assert hold.event() == "held"
        self.stands_still()
        return hold

    def runs(self) -> None:
        at = len(numbers(self.count))
        wait_for(lambda: len(numbers(self.count)) > at, "counting")
        assert_gapless(numbers(self.count))

    def stands_still(self, seconds: float = 0.2) -> None:
        at = numbers(self.count)
        time.sleep(seconds)
        assert numbers(self.count) == at
        assert_gapless(at)

    def dump(self) -> None:
        """Leave the images of a container that is no more."""
        hold = self.checkpoint()
        hold.say("commit")
        assert hold.event() == "done"
        hold.close()
        self.oci.ok("delete", "c")


@pytest.fixture
def case(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> Iterator[Case]:
    bundle = bundles(*counter())
    oci.detached(bundle, "c")
    yield Case(oci, bundle, tmp_path / "images")


def test_a_checkpoint_that_is_committed_kills(case: Case) -> None:
    hold = case.checkpoint()
    hold.say("commit")
    assert hold.event() == "done"
    assert hold.close() == 0
    assert case.oci.status("c") == "stopped"


def test_a_checkpoint_that_is_aborted_runs_on(case: Case) -> None:
    hold = case.checkpoint()
    hold.say("abort")
    assert hold.event() == "aborted"
    assert hold.close() == 3
    assert case.oci.status("c") == "running"
    case.runs()


def test_a_checkpoint_whose_controller_is_gone_runs_on(case: Case) -> None:
    assert case.checkpoint().close() == 3
    case.runs()


def test_a_checkpoint_that_never_went_leaves_it_alone(case: Case) -> None:
    hold = Hold(case.oci, "checkpoint", "--image-path", case.images)
    assert hold.event() == "ready"
    assert hold.close() == 3
    case.runs()


def test_a_checkpoint_whose_controller_is_gone_after_the_decision_stays_frozen(case: Case, tmp_path: Path) -> None:
    decision = tmp_path / "decision"
    hold = case.checkpoint("--decision", str(decision))
    decision.write_text("commit\n")
    assert hold.close() == 3
    case.stands_still()
    assert case.oci.status("c") == "paused"
    case.oci.ok("resume", "c")
    case.runs()


def test_a_checkpoint_that_is_killed_stays_frozen(case: Case) -> None:
    """CRIU resumes what it dumped when its client vanishes; our frozen cgroup is what keeps it still."""
    hold = case.checkpoint()
    hold.process.kill()
    hold.close()
    case.stands_still()
    assert case.oci.status("c") == "paused"
    case.oci.ok("resume", "c")
    case.runs()


@pytest.mark.parametrize("word", ["abort", "commit"])
def test_a_checkpoint_whose_criu_is_killed(case: Case, word: str) -> None:
    """Aborted it runs on; committed it runs elsewhere by then, and must not run here, whoever has to kill it."""
    hold = case.checkpoint()
    children = Path(f"/proc/{hold.process.pid}/task/{hold.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    hold.say(word)
    assert hold.event() in ("error", "aborted")
    hold.close()
    if word == "abort":
        assert case.oci.status("c") == "running"
        case.runs()
    else:
        case.oci.wait_status("c", "stopped")


def test_an_abort_against_the_decision_leaves_it_frozen(case: Case, tmp_path: Path) -> None:
    decision = tmp_path / "decision"
    hold = case.checkpoint("--decision", str(decision))
    decision.write_text("commit\n")
    hold.say("abort")
    assert hold.event() == "aborted"
    assert hold.close() == 3
    case.stands_still()
    assert case.oci.status("c") == "paused"


def test_a_restore_that_is_committed_runs(case: Case) -> None:
    case.dump()
    hold = case.restore()
    hold.say("commit")
    assert [hold.event(), hold.event()] == ["resumed", "done"]
    assert hold.close() == 0
    assert case.oci.status("c") == "running"
    case.runs()


def test_a_restore_that_is_aborted_leaves_nothing(case: Case) -> None:
    case.dump()
    hold = case.restore()
    hold.say("abort")
    assert hold.event() == "aborted"
    assert hold.close() == 3
    assert "does not exist" in case.oci.run("state", "c").stderr
    case.stands_still()


def test_a_restore_whose_controller_is_gone_leaves_nothing(case: Case) -> None:
    case.dump()
    assert case.restore().close() == 3
    assert "does not exist" in case.oci.run("state", "c").stderr
    case.stands_still()


def test_a_restore_that_is_killed_never_runs(case: Case) -> None:
    """At pre-resume CRIU lets the processes run when its client vanishes; our frozen cgroup is what keeps them still."""
    case.dump()
    hold = case.restore()
    hold.process.kill()
    hold.close()
    case.stands_still()
    assert case.oci.status("c") == "paused"
    case.oci.ok("delete", "--force", "c")
    case.stands_still()


def test_a_restore_that_never_went_leaves_nothing(case: Case) -> None:
    case.dump()
    hold = Hold(case.oci, "restore", "--detach", "--image-path", case.images, "--bundle", case.bundle)
    assert hold.event() == "ready"
    assert hold.close() == 3
    assert "does not exist" in case.oci.run("state", "c").stderr


def test_a_word_out_of_turn(case: Case) -> None:
    hold = case.checkpoint()
    hold.say("perhaps")
    assert hold.event() == "error"
    hold.close()
    case.runs()


def test_hold_options_belong_together(case: Case) -> None:
    done = case.oci.run("checkpoint", "--control-fd", "5", "c")
    assert done.returncode == 1 and "--hold" in done.stderr
