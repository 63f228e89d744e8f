"""Memory that follows its processes: they run on with a copy of it that is not whole yet, on the real kernel, with the real CRIU."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from runtime.memory import records
from runtime.memory.later import PAGES_FILE
from tests.helpers.bundle import BundleMaker
from tests.helpers.following import Following
from tests.helpers.memory import Memory, following, system
from tests.helpers.oci import Oci, wait_for
from tests.integration.test_memory import Shifting

pytestmark = [pytest.mark.ferry, following]
null = subprocess.DEVNULL


class Split:
    """A container that stands still as `c`, and whose copy runs as `copy` with what of its memory is there."""

    def __init__(self, oci: Oci, bundle: Path, tmp_path: Path, passes: int = 1) -> None:
        self.oci, self.bundle, self.place = oci, bundle, tmp_path / "there"
        self.following = Following(oci, tmp_path / "images", self.place)
        for _ in range(passes):
            self.following.say("pass", "passed")
        self.asked, self._passes = 0, passes
        self._cut, self._acks = threading.Event(), threading.Event()

    def freeze(self) -> int:
        """Return how many pages come later."""
        self.following.say("prepare", "ready")
        self.following.say("later")
        held = self.following.say("go", "frozen", "held")
        wait_for((self.place / records.name(self._passes + 1)).exists, "the end of the last pass")
        self.following.later = True
        for file in self.following.images.iterdir():
            shutil.copy(file, self.place / file.name)
        return int(held["memory"]["later_pages"])

    def restore(self, acks: bool = True) -> None:
        """Restore the copy, to which its memory comes meanwhile; without `acks` what is asked for, and little more until `go_on`."""
        requests = self.place / "requests"
        os.mkfifo(requests)
        self._requests = os.open(requests, os.O_RDONLY | os.O_NONBLOCK)
        self._carrier = threading.Thread(target=self._carry, daemon=True)
        if acks:
            self.go_on()
        self._carrier.start()
        self.following.say("serve")
        ours, theirs = os.pipe()
        argv = self.oci.argv("restore", "--detach", "--image-path", self.place, "--bundle", self.bundle)
        argv += ["--memory-requests", str(requests), "--drained-fd", str(theirs), "copy"]
        with (self.place / "said").open("wb") as said:  # its stdio becomes the container's
            done = subprocess.run(argv, stdin=null, stdout=null, stderr=said, pass_fds=(theirs,), check=False)
        os.close(theirs)
        assert done.returncode == 0, (self.place / "said").read_text()
        self.drained = os.fdopen(ours, "rb")
        self.oci.at_end.append(self.drained.close)

    def go_on(self) -> None:
        """Have all the rest sent, too."""
        self._acks.set()

    def _carry(self) -> None:
        """Carry what is asked for to where the memory is, until it is cut or nobody asks any more."""
        begun, kept = False, ""
        while not self._cut.is_set():
            if kept and self._acks.is_set():
                self.following.say(kept)
                kept = ""
            if not select.select([self._requests], [], [], 0.01)[0]:
                continue
            data = os.read(self._requests, 1 << 16)  # whole lines, since one that asks writes them at once
            if not data and begun:
                break
            begun = begun or bool(data)
            words = data.decode().splitlines()
            if not self._acks.is_set():
                kept = next((w for w in reversed(words) if w.startswith("ack")), kept)
                words = [w for w in words if not w.startswith("ack")]
            self.asked += sum(w.startswith("page") for w in words)
            for word in words:
                self.following.say(word)
        os.close(self._requests)

    def cut(self) -> None:
        self._cut.set()
        self._carrier.join(30)

    def end(self) -> dict[str, int]:
        """See all of it there, and the one that stood still killed; return what is told of it."""
        assert self.following.event()["error"] == ""
        told: dict[str, int] = json.loads(self.drained.read())
        self._carrier.join(30)
        assert self.oci.status("c") == "paused"
        self.following.say("commit", "done")
        assert self.following.close() == 0
        assert self.oci.status("copy") == "running"
        return told


@pytest.fixture
def memory(oci: Oci, bundles: BundleMaker) -> Memory:
    return Memory(oci, bundles, 16)


def test_it_runs_before_its_memory_is_there(oci: Oci, memory: Memory, tmp_path: Path) -> None:
    split = Split(oci, memory.bundle, tmp_path, passes=0)
    later = split.freeze()
    assert later > 16 * 256
    split.restore(acks=False)
    memory.ask()
    assert split.asked > 0
    split.go_on()
    told = split.end()
    assert told["later_pages"] == later and told["waited_for"] > 0
    memory.ask()


def test_only_what_changed_comes_later(oci: Oci, memory: Memory, tmp_path: Path) -> None:
    split = Split(oci, memory.bundle, tmp_path)
    memory.ask()
    assert 4 <= split.freeze() < 1024
    split.restore()
    split.end()
    memory.ask()


@pytest.mark.parametrize("seed", range(4))
def test_mappings_that_change_meanwhile(oci: Oci, bundles: BundleMaker, tmp_path: Path, seed: int) -> None:
    """Much of its memory comes later, to a parent and its child, who move and unmap it meanwhile."""
    shifting = Shifting(oci, bundles, seed)
    split = Split(oci, shifting.bundle, tmp_path, passes=seed % 2)
    shifting.ask()
    assert split.freeze() > 16
    split.restore()
    shifting.ask()
    split.end()
    shifting.ask()


# Its parent writes, and children that are forked all the time see what it had at that moment.
_FORKING = """
import os
m = bytearray(b'%04d' % 1 * 1024 * 256 * 24)
n = 1
while True:
    if os.path.exists('/go'):
        n += 1
        child = os.fork()
        if child == 0:
            wrong = sum(m[i:i + 4] != m[0:4] for i in range(0, len(m), 4096))
            os._exit(1 if wrong else 0)
        if os.waitpid(child, 0)[1]: open('/wrong', 'w')
        for i in range(0, len(m), 4096): m[i:i + 4] = b'%04d' % (n % 10000)
    with open('/round.new', 'w') as f: f.write(str(n))
    os.rename('/round.new', '/round')
"""


def test_children_that_are_forked_meanwhile(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles("/usr/bin/python3", "-c", _FORKING, change=system)
    oci.detached(bundle, "c")
    wait_for((bundle / "rootfs/round").exists, "the first round", 60)
    split = Split(oci, bundle, tmp_path, passes=0)
    split.freeze()
    (bundle / "rootfs/go").touch()
    split.restore()
    wait_for(lambda: int((bundle / "rootfs/round").read_text() or 0) > 3, "its rounds", 60)
    split.end()
    assert not (bundle / "rootfs/wrong").exists()


def test_what_is_here_is_filled_in_without_the_other(oci: Oci, memory: Memory, tmp_path: Path) -> None:
    """When all of the rest has come, nobody is needed any more."""
    split = Split(oci, memory.bundle, tmp_path)
    memory.ask()
    split.freeze()
    split.restore()
    assert split.following.event()["error"] == ""
    split.cut()
    memory.ask()
    assert json.loads(split.drained.read())["later_pages"] > 0


def test_the_one_that_has_the_rest_goes(oci: Oci, memory: Memory, tmp_path: Path) -> None:
    """The copy never runs on with memory that is not its own; the one that stands still is left so until it is decided."""
    split = Split(oci, memory.bundle, tmp_path, passes=0)
    split.freeze()
    split.restore(acks=False)
    (memory.bundle / "rootfs/ask").touch()
    split.cut()
    assert split.drained.read() == b"", "it says that all is there"
    wait_for(lambda: oci.status("copy") == "stopped", "its end")
    assert "the rest of the memory is gone" in oci.state("copy")["annotations"]["ferry.failure"]
    assert oci.status("c") == "paused"
    split.following.close()
    assert oci.status("c") == "running", "nothing was decided"
    memory.ask()


def test_aborted_while_it_is_served(oci: Oci, memory: Memory, tmp_path: Path) -> None:
    split = Split(oci, memory.bundle, tmp_path, passes=0)
    split.freeze()
    split.restore(acks=False)
    oci.ok("delete", "--force", "copy")
    split.following.say("abort", "aborted")
    split.cut()
    split.following.close()
    assert oci.status("c") == "running"
    memory.ask()


def test_nobody_is_there_to_ask(oci: Oci, memory: Memory, tmp_path: Path) -> None:
    split = Split(oci, memory.bundle, tmp_path)
    memory.ask()
    split.freeze()
    assert json.loads((split.place / PAGES_FILE).read_text())
    done = oci.run("restore", "--detach", "--image-path", split.place, "--bundle", memory.bundle, "copy")
    assert done.returncode != 0 and "was to be sent later" in done.stderr
    split.following.close()
    memory.ask()
