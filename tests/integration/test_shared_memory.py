"""Memory that processes share, sent while they run: what changed is found whoever wrote it, and comes back as it was."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.following import Following, restored
from tests.helpers.memory import following, system
from tests.helpers.oci import Oci, wait_for

pytestmark = [pytest.mark.ferry, following]
null = subprocess.DEVNULL

# Three shared memories, of which one has holes. Each round a page here and there is written, by a process that has ended before the
# round is told to be over; another one has the same mapped, and looks at it.
PROGRAM = """
import ctypes, hashlib, mmap, os, random, time
MIB, PAGE = 1 << 20, 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
anonymous = mmap.mmap(-1, 24 * MIB, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
memfd = os.memfd_create('shared')
os.ftruncate(memfd, 64 * MIB)
sparse = mmap.mmap(memfd, 64 * MIB, mmap.MAP_SHARED)
shmid = libc.shmget(0, 4 * MIB, 0o1600)
at = libc.shmat(shmid, None, 0)
system_v = memoryview((ctypes.c_char * (4 * MIB)).from_address(at)).cast('B')
whole = [anonymous, sparse, system_v]
for i in range(24): anonymous[i * MIB:(i + 1) * MIB] = hashlib.sha256(b'%d' % i).digest() * 32768
for i in range(0, 64, 4): sparse[i * MIB + 5 * PAGE:i * MIB + 6 * PAGE] = os.urandom(PAGE)
system_v[:] = os.urandom(4 * MIB)
def digest():
    h = hashlib.sha256()
    for m in whole: h.update(m)
    return h.hexdigest()
def write(r):
    for m in whole:
        for _ in range(6):
            page = r.randrange(len(m) // PAGE) * PAGE
            m[page + 8:page + 40] = os.urandom(32)
    if r.randrange(2):
        page = r.randrange(60) * MIB
        libc.fallocate(memfd, 3, ctypes.c_long(page), ctypes.c_long(MIB))
def say(name, *words):
    with open(name + '.new', 'w') as f: f.write(' '.join(map(str, words)))
    os.rename(name + '.new', name)
ready, told = os.pipe()
if os.fork() == 0:
    while True:
        os.read(ready, 1)
        say('/second', digest())
round = 0
before = digest()
say('/first', 0, before, before)
while True:
    asked = int(open('/ask').read() or 0)
    if asked > round:
        round = asked
        found = digest()
        child = os.fork()
        if child == 0:
            write(random.Random(round))
            os._exit(0)
        os.waitpid(child, 0)
        before, now = digest(), found
        os.unlink('/second') if os.path.exists('/second') else None
        os.write(told, b'x')
        say('/first', round, now, before)
    time.sleep(0.01)
"""


class Sharing:
    """A container of processes that share memory."""

    def __init__(self, oci: Oci, bundles: BundleMaker) -> None:
        self.bundle = bundles("/usr/bin/python3", "-c", PROGRAM, change=system)
        self._root = self.bundle / "rootfs"
        self._round, self._expected = 0, ""
        (self._root / "ask").write_text("0")
        oci.detached(self.bundle, "c")
        wait_for((self._root / "first").exists, "the first answer", 60)
        self._expected = (self._root / "first").read_text().split()[2]

    def ask(self) -> None:
        """See that all of it is as it was left, in both processes, and have it changed."""
        self._round += 1
        new = self._root / "ask.new"
        new.write_text(str(self._round))
        new.rename(self._root / "ask")
        first, second = self._root / "first", self._root / "second"
        wait_for(lambda: first.read_text().startswith(f"{self._round} "), "an answer", 60)
        _, found, left = first.read_text().split()
        assert found == self._expected, "it is not what it was"
        wait_for(second.exists, "the second process's answer", 60)
        assert second.read_text() == left, "the processes see different things"
        self._expected = left


def test_it_is_sent_while_they_run(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    sharing = Sharing(oci, bundles)
    for turn in range(2):
        images, place = tmp_path / f"images{turn}", tmp_path / f"there{turn}"
        following = Following(oci, images, place)
        first = following.say("pass", "passed")
        assert first["pages"] > 28 * 256, first
        sharing.ask()
        again = following.say("pass", "passed")
        assert again["pages"] < 3000, again
        sharing.ask()
        held = following.to_the_hold()
        assert held["memory"]["pages"] < 3000, held
        assert len(json.loads((images / "memory-shared.json").read_text())) == 3
        assert sum(f.stat().st_size for f in images.glob("pages-*.img")) < 4 << 20
        following.finish()
        restored(oci, sharing.bundle, place)
        sharing.ask()
        sharing.ask()


def test_a_pass_that_is_lost(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    sharing = Sharing(oci, bundles)
    place = tmp_path / "there"
    following = Following(oci, tmp_path / "images", place)
    following.say("pass", "passed")
    following.to_the_hold()
    following.finish()
    (place / "memory-1.img").unlink()
    oci.ok("delete", "c")
    failed = oci.run("restore", "--detach", "--image-path", place, "--bundle", sharing.bundle, "c")
    assert failed.returncode != 0
    assert "is in no pass" in failed.stderr or "are in no pass" in failed.stderr, failed.stderr
    assert oci.run("state", "c").returncode != 0


def test_another_checkpoint_in_the_same_place(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """Nothing of the first one is taken for a part of it."""
    sharing = Sharing(oci, bundles)
    images = tmp_path / "images"
    following = Following(oci, images, tmp_path / "there")
    following.say("pass", "passed")
    following.to_the_hold()
    assert (images / "memory-shared.json").exists()
    following.say("abort")
    following.close()
    sharing.ask()
    oci.ok("checkpoint", "--image-path", images, "c")
    assert not (images / "memory-shared.json").exists()
    oci.ok("restore", "--detach", "--image-path", images, "--bundle", sharing.bundle, "c", stdout=null, stderr=null)
    sharing.ask()
