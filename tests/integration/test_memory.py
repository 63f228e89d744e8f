"""A container's memory, followed while it runs and brought back page by page: on the real kernel, with the real CRIU."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from runtime.memory import records
from tests.helpers.bundle import BundleMaker
from tests.helpers.following import Following, restored
from tests.helpers.memory import Memory, following, system
from tests.helpers.oci import Oci, wait_for

pytestmark = [pytest.mark.ferry, following]
null = subprocess.DEVNULL

# Changes its mappings in all ways, by a seed for each round; each page that it has is known by what it must hold. A child does the same.
PROGRAM = """
import ctypes, mmap, os, random, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = 4096
areas = {{}}  # start -> what each page holds, a number
def put(at, number):
    ctypes.c_uint64.from_address(at).value = ctypes.c_uint64.from_address(at + 2048).value = number
def get(at):
    first, second = ctypes.c_uint64.from_address(at).value, ctypes.c_uint64.from_address(at + 2048).value
    return first if first == second else -1
def new(r):
    pages = r.randrange(1, 900)
    areas[libc.mmap(None, pages * PAGE, 3, 0x22, -1, 0)] = [0] * pages
def change(r, round):
    for _ in range(40):
        what = r.randrange(8)
        if not areas or what == 0:
            new(r)
            continue
        start = r.choice(sorted(areas))
        numbers = areas[start]
        if what < 4:
            for i in r.sample(range(len(numbers)), max(1, len(numbers) // 3)):
                numbers[i] = (round << 32) + r.randrange(1, 1 << 32)
                put(start + i * PAGE, numbers[i])
        elif what == 4:
            i = r.randrange(len(numbers))
            libc.madvise(start + i * PAGE, (len(numbers) - i) * PAGE, 4)
            numbers[i:] = [0] * (len(numbers) - i)
        elif what == 5:
            size = r.randrange(1, 900)
            moved = libc.mremap(start, len(numbers) * PAGE, size * PAGE, 1)
            del areas[start]
            areas[moved] = (numbers + [0] * size)[:size]
        elif what == 6 and len(areas) > 3:
            libc.munmap(start, len(numbers) * PAGE, 0)
            del areas[start]
        elif what == 7:
            libc.mprotect(start, len(numbers) * PAGE, 0)
            libc.mprotect(start, len(numbers) * PAGE, 3)
def wrong():
    return sum(get(start + i * PAGE) != n for start, numbers in areas.items() for i, n in enumerate(numbers))
def live(name):
    round = 0
    while True:
        asked = int(open('/ask').read() or 0)
        if asked > round:
            round = asked
            before = wrong()
            change(random.Random(f'{{name}} {{round}} {seed}'), round)
            with open(f'/{{name}}.new', 'w') as f:
                f.write(f'{{round}} {{before}} {{wrong()}} {{sum(map(len, areas.values()))}}')
            os.rename(f'/{{name}}.new', f'/{{name}}')
        time.sleep(0.01)
for _ in range(4):
    new(random.Random({seed}))
change(random.Random({seed}), 0)
live('parent' if os.fork() else 'child')
"""


class Shifting:
    """A container of two processes whose memory never stays the same."""

    def __init__(self, oci: Oci, bundles: BundleMaker, seed: int) -> None:
        self.bundle = bundles("/usr/bin/python3", "-c", PROGRAM.format(seed=seed), change=system)
        self.round = 0
        (self.bundle / "rootfs/ask").write_text("0")
        oci.detached(self.bundle, "c")

    def ask(self) -> None:
        """Have both processes look at all of their memory, and change it."""
        self.round += 1
        new = self.bundle / "rootfs/ask.new"
        new.write_text(str(self.round))
        new.rename(self.bundle / "rootfs/ask")
        for name in ("parent", "child"):
            answer = self.bundle / "rootfs" / name
            wait_for(lambda a=answer: a.exists() and a.read_text().startswith(f"{self.round} "), f"the {name}'s answer", 60)
            assert answer.read_text().split()[1:3] == ["0", "0"], f"{name} has pages that are wrong"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "there"


def test_only_what_changed_goes_again(oci: Oci, bundles: BundleMaker, tmp_path: Path, place: Path) -> None:
    memory = Memory(oci, bundles, 32)
    following = Following(oci, tmp_path / "images", place)
    whole = following.say("pass", "passed")
    assert whole["pages"] > 32 * 256 and whole["left_out"] == [], whole
    memory.ask()
    again = following.say("pass", "passed")
    assert 8 <= again["pages"] < 8 * 256, again
    held = following.to_the_hold()
    assert held["memory"]["pages"] < 1024 and held["memory"]["late_pages"] < 64, held
    assert sum(f.stat().st_size for f in (tmp_path / "images").glob("pages-*.img")) < 4 << 20
    following.finish()
    restored(oci, memory.bundle, place)
    memory.ask()


def test_processes_that_come_and_go(oci: Oci, bundles: BundleMaker, tmp_path: Path, place: Path) -> None:
    """Whatever moment of theirs a look finds them in."""
    script = "i=0; while :; do i=$((i+1)); echo $i >/count; true | /bin/busybox cat; /bin/busybox true; done"
    bundle = bundles("sh", "-c", script)
    oci.detached(bundle, "c")
    following = Following(oci, tmp_path / "images", place)
    for _ in range(150):
        following.say("pass", "passed")
    following.to_the_hold()
    following.finish()
    restored(oci, bundle, place)
    before = (bundle / "rootfs/count").read_text()
    wait_for(lambda: (bundle / "rootfs/count").read_text() not in ("", before), "going on")


@pytest.mark.parametrize("seed", range(4))
def test_memory_that_shifts(oci: Oci, bundles: BundleMaker, tmp_path: Path, seed: int) -> None:
    """Mapped, moved, dropped, protected and forked between the passes, and again while it is being filled; then moved once more."""
    shifting = Shifting(oci, bundles, seed)
    chosen = random.Random(seed)
    for turn in range(2):
        place = tmp_path / f"there{turn}"
        following = Following(oci, tmp_path / f"images{turn}", place)
        for _ in range(chosen.randrange(4)):
            following.say("pass", "passed")
            shifting.ask()
        following.to_the_hold()
        following.finish()
        restored(oci, shifting.bundle, place)
        for _ in range(3):
            shifting.ask()
        wait_for(lambda p=place: not (p / "lazy-pages.socket").exists(), "the drain", 60)
        shifting.ask()


def test_aborted(oci: Oci, bundles: BundleMaker, tmp_path: Path, place: Path) -> None:
    memory = Memory(oci, bundles, 16)
    following = Following(oci, tmp_path / "images", place)
    following.say("pass", "passed")
    following.to_the_hold()
    following.say("abort", "aborted")
    assert following.close() == 3
    assert oci.status("c") == "running"
    memory.ask()


@pytest.mark.parametrize("when", ["following", "ready", "held"])
def test_killed(oci: Oci, bundles: BundleMaker, tmp_path: Path, place: Path, when: str) -> None:
    memory = Memory(oci, bundles, 16)
    following = Following(oci, tmp_path / "images", place)
    following.say("pass", "passed")
    if when == "ready":
        following.say("prepare", "ready")
    if when == "held":
        following.to_the_hold()
    following.process.kill()
    following.close()
    if when == "held":
        assert oci.status("c") == "paused", "it is never let run by itself"
        oci.ok("resume", "c")
    assert oci.status("c") == "running"
    memory.ask()
    # Nothing of the first one is in the way of another.
    again = Following(oci, tmp_path / "images", tmp_path / "again")
    again.to_the_hold()
    again.finish()
    restored(oci, memory.bundle, tmp_path / "again")
    memory.ask()


@pytest.mark.parametrize("words", [("pass",), ("prepare", "go")])
def test_nobody_reads(oci: Oci, bundles: BundleMaker, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Also when CRIU has written its images already, and waits: it is ended, and the container runs on at once."""
    memory = Memory(oci, bundles, 8)
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    os.close(read)
    argv = oci.argv("checkpoint", "--hold", "--control-fd", str(theirs.fileno()), "--memory-fd", str(write))
    process = subprocess.Popen(
        [*argv, "--image-path", tmp_path / "images", "c"], pass_fds=(theirs.fileno(), write), stdin=null, stderr=null
    )
    os.close(write)
    theirs.close()
    with ours, ours.makefile("r") as events:
        assert json.loads(events.readline())["event"] == "following"
        for word in words:
            ours.sendall(f"{word}\n".encode())
        event = json.loads(events.readline())
        while event["event"] in ("ready", "frozen"):
            event = json.loads(events.readline())
        assert "nobody reads" in event["error"]["message"], event
        assert process.wait(20) == 1
    assert oci.status("c") == "running"
    memory.ask()


def test_another_program_is_executed(oci: Oci, bundles: BundleMaker, tmp_path: Path, place: Path) -> None:
    """What was sent of a program counts for nothing when the process executes another one."""
    memory = Memory(oci, bundles, 4)
    script = f"exec /usr/bin/python3 -c {_quoted(memory.bundle / 'config.json')}"
    oci.ok("kill", "c", "KILL")
    wait_for(lambda: oci.status("c") == "stopped", "the end")
    oci.ok("delete", "c")
    (memory.bundle / "rootfs/answer").unlink()
    document = json.loads((memory.bundle / "config.json").read_text())
    waiting = "while ! [ -e /go ]; do sleep 0.01; done; "
    document["process"]["args"] = ["/usr/bin/bash", "-c", waiting + script]
    (memory.bundle / "config.json").write_text(json.dumps(document))
    oci.detached(memory.bundle, "c")
    following = Following(oci, tmp_path / "images", place)
    assert following.say("pass", "passed")["pages"] > 10
    (memory.bundle / "rootfs/go").touch()
    wait_for((memory.bundle / "rootfs/answer").exists, "the other program", 60)
    following.to_the_hold()
    following.finish()
    restored(oci, memory.bundle, place)
    memory.ask()


def _quoted(config: Path) -> str:
    import shlex

    return shlex.quote(json.loads(config.read_text())["process"]["args"][2])


@pytest.fixture
def sent(oci: Oci, bundles: BundleMaker, tmp_path: Path, place: Path) -> Iterator[Memory]:
    memory = Memory(oci, bundles, 16)
    following = Following(oci, tmp_path / "images", place)
    following.say("pass", "passed")
    following.to_the_hold()
    following.finish()
    oci.ok("delete", "c")
    yield memory


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_pass_that_is_not_whole(oci: Oci, sent: Memory, place: Path, damage: str) -> None:
    path = place / records.name(1)
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    done = oci.run("restore", "--detach", "--image-path", place, "--bundle", sent.bundle, "c", stdout=null)
    assert done.returncode == 1
    assert ("in no pass" if damage == "missing" else "memory-1.img is damaged or cut short") in done.stderr, done.stderr
    assert "does not exist" in oci.run("state", "c").stderr


def test_no_memory_at_all(oci: Oci, sent: Memory, place: Path) -> None:
    for path in records.files(place):
        path.unlink()
    done = oci.run("restore", "--detach", "--image-path", place, "--bundle", sent.bundle, "c", stdout=null)
    assert done.returncode == 1 and "lack the memory" in done.stderr, done.stderr


def test_the_filling_dies(oci: Oci, sent: Memory, place: Path) -> None:
    """Its memory is not whole: it is killed, and never runs on with zeros."""
    told, process = _restoring(oci, sent, place)
    deadline = time.monotonic() + 30
    daemon = None
    while daemon is None and time.monotonic() < deadline:
        daemon = _filler(place)
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    process.wait(60)
    assert told.read() == b"", "it says that all is there"
    if "does not exist" not in oci.run("state", "c").stderr:
        wait_for(lambda: oci.status("c") == "stopped", "the end")


def test_it_is_told_when_all_is_there(oci: Oci, sent: Memory, place: Path) -> None:
    told, process = _restoring(oci, sent, place)
    assert process.wait(60) == 0
    said = json.loads(told.read())
    assert said["pages"] > 16 * 256 and said["seconds"] > 0 and said["waited_for"] >= 0
    sent.ask()


def _restoring(oci: Oci, sent: Memory, place: Path) -> tuple[BinaryIO, subprocess.Popen[bytes]]:
    """Begin a restore; return what is told of its memory."""
    ours, theirs = os.pipe()
    argv = oci.argv("restore", "--detach", "--image-path", place, "--bundle", sent.bundle, "--drained-fd", str(theirs), "c")
    process = subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, pass_fds=(theirs,))
    os.close(theirs)
    told = os.fdopen(ours, "rb")
    oci.at_end.append(told.close)
    return told, process


def _filler(place: Path) -> int | None:
    """Return the process that listens at the socket in an image directory."""
    from runtime.linux import sockdiag

    if not (place / "lazy-pages.socket").exists() or not sockdiag.bound_at(str(place / "lazy-pages.socket")):
        return None
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(place):
                return int(entry.name)
        except OSError:
            continue
    return None


NEIGHBOURS = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
at = libc.mmap(None, 200 * 4096, 3, 0x22, -1, 0)
for i in range(200): ctypes.c_uint64.from_address(at + i * 4096).value = i + 1
for i in range(0, 200, 3): libc.mprotect(at + i * 4096, 4096, 1)
open('/ready', 'w')
while not os.path.exists('/go'): time.sleep(0.01)
wrong = sum(ctypes.c_uint64.from_address(at + i * 4096).value != i + 1 for i in reversed(range(200)))
open('/wrong.new', 'w').write(str(wrong))
os.rename('/wrong.new', '/wrong')
while True: time.sleep(1)
"""


def test_mappings_that_lie_side_by_side(oci: Oci, bundles: BundleMaker, tmp_path: Path, place: Path) -> None:
    """A page is filled in one mapping at a time, though what is known of their content goes over their ends."""
    bundle = bundles("/usr/bin/python3", "-c", NEIGHBOURS, change=system)
    oci.detached(bundle, "c")
    wait_for((bundle / "rootfs/ready").exists, "its memory", 30)
    following = Following(oci, tmp_path / "images", place)
    following.say("pass", "passed")
    following.to_the_hold()
    following.finish()
    restored(oci, bundle, place)
    (bundle / "rootfs/go").touch()
    wait_for((bundle / "rootfs/wrong").exists, "what is wrong", 30)
    assert (bundle / "rootfs/wrong").read_text() == "0"


def test_a_name_that_looks_like_another_line(oci: Oci, bundles: BundleMaker, tmp_path: Path, place: Path) -> None:
    """A process may be called what it likes: it does not become another one's memory."""
    memory = Memory(oci, bundles, 4)
    liar = "open('/proc/self/comm', 'w').write('\\\\fNSpid:\\\\t1'); import time; time.sleep(1000)"
    oci.ok("kill", "c", "KILL")
    wait_for(lambda: oci.status("c") == "stopped", "the end")
    oci.ok("delete", "c")
    (memory.bundle / "rootfs/answer").unlink()
    document = json.loads((memory.bundle / "config.json").read_text())
    program = document["process"]["args"][2]
    document["process"]["args"][2] = f"import os\nif os.fork() == 0: exec({liar!r})\n{program}"
    (memory.bundle / "config.json").write_text(json.dumps(document))
    oci.detached(memory.bundle, "c")
    wait_for((memory.bundle / "rootfs/answer").exists, "the first answer", 60)
    following = Following(oci, tmp_path / "images", place)
    passed = following.say("pass", "passed")
    assert passed["processes"] == 2 and passed["left_out"] == []
    wait_for((place / records.name(1)).exists, "the whole pass")
    numbers = {r.pid for r, _ in records.read(place / records.name(1))[1]}
    assert len(numbers) == 2
    following.to_the_hold()
    following.finish()
    restored(oci, memory.bundle, place)
    memory.ask()
