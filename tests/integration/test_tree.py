"""A tree that is looked at only where it changed is the same as one that is looked at as a whole."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from migrate.manifest import Manifest
from migrate.rootfs import scan
from migrate.tree import Tree
from migrate.watch import Watch
from tests.helpers.copies import Copies

pytestmark = pytest.mark.ferry


def facts(items: Manifest) -> dict[bytes, object]:
    return {path: replace(item, seen_ns=0) for path, item in items.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    (root / "etc/deep/er").mkdir(parents=True)
    for i in range(50):
        (root / f"etc/deep/file{i}").write_text(str(i))
    return root


@pytest.fixture
def tree(root: Path) -> Iterator[Tree]:
    tree = Tree(root)
    assert tree.reason == "", "this file system's changes cannot be watched"
    assert tree.look() is None, "at first all is looked at"
    yield tree
    tree.close()


def change(r: random.Random, root: Path, outside: Path) -> None:
    """Do one thing to a tree, of all that can be done to one."""
    directories = [Path(base) for base, _, _ in os.walk(root)]
    entries = [Path(base) / n for base, ds, fs in os.walk(root) for n in ds + fs]
    files = [e for e in entries if e.is_file() and not e.is_symlink()]
    into = r.choice(directories)
    name = into / f"n{r.randrange(40)}"
    what = r.randrange(15)
    if what == 0 and not os.path.lexists(name):
        name.mkdir()
    elif what == 1 and not name.is_dir():
        name.write_text(str(r.random()))
    elif what == 2 and files:
        os.truncate(r.choice(files), r.randrange(100))
    elif what == 3 and entries:
        chosen = r.choice(entries)
        shutil.rmtree(chosen) if chosen.is_dir() and not chosen.is_symlink() else chosen.unlink()
    elif what in (4, 5) and entries and not os.path.lexists(name):
        chosen = r.choice(entries)
        if chosen not in name.parents:
            chosen.rename(name)
    elif what == 6 and files and not os.path.lexists(name):
        os.link(r.choice(files), name)
    elif what == 7 and not os.path.lexists(name):
        name.symlink_to(r.choice(["..", "/etc", "nowhere"]))
    elif what == 8 and files:
        os.chmod(r.choice(files + directories), r.choice([0o700, 0o755]))
    elif what == 9 and files:
        os.setxattr(r.choice(files), "user.x", str(r.random()).encode())
    elif what == 10 and files:
        os.utime(r.choice(files), ns=(r.randrange(1 << 60), r.randrange(1 << 60)))
    elif what == 11 and not os.path.lexists(name):
        (outside / "a/b").mkdir(parents=True, exist_ok=True)
        (outside / "a/b/c").write_text("from outside")
        (outside / "a").rename(name)
    elif what == 12 and entries:
        chosen = r.choice(entries)
        chosen.rename(outside / f"gone{time.monotonic_ns()}")
    elif what == 13 and files:
        chosen = r.choice(files)
        new = chosen.with_name("new")
        new.write_text("renamed over")
        new.rename(chosen)
    elif what == 14 and len(directories) > 2:
        # The same name, and mostly the same number, for another directory.
        chosen = r.choice(directories[1:])
        shutil.rmtree(chosen)
        chosen.mkdir()
        (chosen / "inside").write_text("x")


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_done_to_it(root: Path, tree: Tree, tmp_path: Path, seed: int) -> None:
    r, outside = random.Random(seed), tmp_path / "outside"
    outside.mkdir()
    for _ in range(40):
        before = dict(tree.items)
        for _ in range(r.randrange(12)):
            change(r, root, outside)
        touched = tree.look()
        assert touched is not None
        now = scan(root)
        assert facts(tree.items) == facts(now)
        differs = {p for p in before.keys() | now.keys() if p not in before or p not in now or not _same(before, now, p)}
        assert differs <= touched


def _same(before: Manifest, now: Manifest, path: bytes) -> bool:
    return replace(before[path], seen_ns=0) == replace(now[path], seen_ns=0)


def test_little_is_looked_at(root: Path, tree: Tree) -> None:
    time.sleep(0.1)
    tree.look()  # what was made just before
    (root / "etc/deep/file7").write_text("changed")
    (root.parent / "beside").write_text("not in it")
    assert tree.look() == {b"etc/deep/file7"}
    time.sleep(0.1)
    assert tree.look() in ({b"etc/deep/file7"}, set()), "only what was changed too shortly before the last look"
    time.sleep(0.1)
    assert tree.look() == set()


def test_while_it_goes_on(root: Path, tree: Tree, tmp_path: Path) -> None:
    """Changed by somebody else all the time that it is looked at: when he is through, the next look has all of it."""
    (tmp_path / "outside").mkdir()
    r, stop = random.Random(5), threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            change(r, root, tmp_path / "outside")

    thread = threading.Thread(target=go_on)
    thread.start()
    for _ in range(30):
        tree.look()
    stop.set()
    thread.join()
    tree.look()
    assert facts(tree.items) == facts(scan(root))


def test_what_is_written_through_a_mapping(root: Path, tree: Tree) -> None:
    """Of that the kernel tells when the last one lets go of the file; until then it is doubtful."""
    time.sleep(0.1)
    tree.look()
    path = root / "etc/deep/file1"
    path.write_bytes(bytes(4096))
    time.sleep(0.1)
    tree.look(), time.sleep(0.1), tree.look()
    inode = (path.stat().st_dev, path.stat().st_ino)
    with path.open("r+b") as f:
        mapped = mmap.mmap(f.fileno(), 4096)
    mapped[0] = 1
    assert b"etc/deep/file1" in (tree.look([inode]) or ())
    mapped[1] = 2
    mapped.close()
    assert b"etc/deep/file1" in (tree.look() or ())
    assert facts(tree.items) == facts(scan(root))


def test_an_attribute_goes_with_a_change_of_a_large_file(root: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    large, copy = root / "large", tmp_path / "copy/large"
    large.write_bytes(bytes(range(256)) * 8192)
    os.setxattr(large, "user.before", b"1")
    os.setxattr(large, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    copies = Copies(root, tmp_path / "copy")
    try:
        copies.send()
        assert set(os.listxattr(copy)) == {"user.before", "security.capability"}
        with large.open("r+b") as f:
            f.write(b"changed")  # takes its capabilities
        os.removexattr(large, "user.before")
        os.setxattr(large, "user.after", b"2")
        assert copies.send().content_bytes < 100_000
        assert set(os.listxattr(copy)) == set(os.listxattr(large)) == {"user.after"}
        assert copy.read_bytes() == large.read_bytes()
    finally:
        copies.close()


def test_events_that_were_lost(root: Path, tree: Tree) -> None:
    assert tree._watch is not None
    tree._watch._overflowed = True
    (root / "new").touch()
    assert tree.look() is None and b"new" in tree.items


def test_where_it_cannot_be_had(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Watch, root: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Watch, "__init__", refuse)
    tree = Tree(root)
    assert "does not tell" in tree.reason
    assert tree.look() is None and tree.look() is None
    assert facts(tree.items) == facts(scan(root))
