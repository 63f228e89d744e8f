"""Of a large file that changed only its changed blocks are sent, and the copy is what the file is."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.blocks import LEAST_FILE_BYTES, Blocks
from migrate.manifest import Item
from migrate.outgoing import TreeSender
from migrate.wire import PIECE_BYTES
from tests.helpers.copies import Copies

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    root.mkdir()
    (root / "data").write_bytes(random.Random(0).randbytes(6 * MIB + 1234))
    return root


@pytest.fixture
def copies(root: Path, tmp_path: Path) -> Iterator[Copies]:
    (tmp_path / "copy").mkdir()
    made = Copies(root, tmp_path / "copy")
    made.send()
    yield made
    made.close()


def same(root: Path) -> None:
    copy = root.parent / "copy"
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in root.iterdir())
    for file in root.iterdir():
        of_it = copy / file.name
        assert of_it.read_bytes() == file.read_bytes(), file.name
        assert of_it.stat().st_nlink == file.stat().st_nlink
        assert of_it.stat().st_mtime_ns == file.stat().st_mtime_ns


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(data)


@pytest.mark.parametrize("offset", [0, 4096, 3 * MIB - 10, 6 * MIB + 1000])
def test_a_page_of_it(root: Path, copies: Copies, offset: int) -> None:
    write(root / "data", offset, b"changed" * 3)
    block = Blocks((root / "data").stat().st_size).block_bytes
    assert 0 < copies.send().content_bytes <= 2 * block
    same(root)


def test_its_end(root: Path, copies: Copies) -> None:
    data = root / "data"
    for size in (6 * MIB + 1235, 5 * MIB, 5 * MIB - 1, 7 * MIB, LEAST_FILE_BYTES + 5):
        os.truncate(data, size)
        assert copies.send().content_bytes < MIB
        same(root)
    with data.open("ab") as f:
        f.write(b"more" * 10)
    assert copies.send().content_bytes < MIB
    same(root)
    os.truncate(data, 10)
    assert copies.send().content_bytes == 10
    same(root)


def test_another_file_of_its_name(root: Path, copies: Copies) -> None:
    new = root / "new"
    new.write_bytes((root / "data").read_bytes())
    write(new, 5 * MIB, b"changed")
    new.rename(root / "data")
    assert copies.send().content_bytes < MIB
    same(root)


def test_another_name_of_the_file(root: Path, copies: Copies) -> None:
    """What the two names have in common must not be changed for one of them alone."""
    os.link(root / "data", root / "second")
    copies.send()
    same(root)
    old = (root / "data").read_bytes()
    (root / "data").unlink()
    (root / "data").write_bytes(old)
    write(root / "data", MIB, b"of one of them")
    copies.send()
    same(root)


def test_holes(root: Path, copies: Copies) -> None:
    data = root / "data"
    subprocess.run(["fallocate", "--punch-hole", "--offset", str(MIB + 100), "--length", str(2 * MIB), data], check=True)
    copies.send()
    same(root)
    write(data, 2 * MIB, b"in the hole")
    assert copies.send().content_bytes < MIB
    same(root)
    subprocess.run(["fallocate", "--punch-hole", "--offset", str(6 * MIB), "--length", str(MIB), data], check=True)
    copies.send()
    same(root)


def test_holes_stay_holes(root: Path, copies: Copies) -> None:
    with (root / "sparse").open("wb") as f:
        for at in range(0, 64 * MIB, MIB):
            f.seek(at + 5000)
            f.write(b"a page")
    assert copies.send().content_bytes <= 64 * 8192
    same(root)
    copy = root.parent / "copy/sparse"
    assert copy.stat().st_blocks == (root / "sparse").stat().st_blocks
    with (root / "sparse").open("r+b") as f:
        f.seek(7 * MIB + 9000)
        f.write(b"another")
    assert copies.send().content_bytes <= 32 << 10
    same(root)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_written(root: Path, copies: Copies, seed: int) -> None:
    r = random.Random(seed)
    for _ in range(12):
        for _ in range(r.randrange(4)):
            files = sorted(root.iterdir())
            file = r.choice(files)
            size = file.stat().st_size
            what = r.randrange(7)
            if what == 0:
                os.truncate(file, r.choice([0, size // 2, size + r.randrange(2 * MIB), MIB, size // 16384 * 16384]))
            elif what == 1 and len(files) < 4:
                os.link(file, root / f"name{r.randrange(10**9)}")
            elif what == 2 and len(files) > 1:
                file.unlink()
            elif what == 3:
                file.rename(root / f"name{r.randrange(3)}")
            elif what == 4 and size:
                length = r.randrange(1, size + 1)
                subprocess.run(["fallocate", "-p", "-o", str(r.randrange(size)), "-l", str(length), file], check=True)
            else:
                write(file, r.randrange(size + 1), r.randbytes(r.choice([1, 4096, 100_000])))
        copies.send()
        same(root)


def _meanwhile(m: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Have something happen before each read of a file's content."""
    read = TreeSender._read

    def reading(self: TreeSender, fd: int, offset: int, count: int) -> memoryview:
        happens()
        return read(self, fd, offset, count)

    m.setattr(TreeSender, "_read", reading)


def test_while_it_is_written(root: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next time all of it is right, whatever was sent of a file that changed under our hands."""
    data, r = root / "data", random.Random(3)

    def change() -> None:
        what = r.randrange(6)
        size = data.stat().st_size
        if what == 0:
            os.truncate(data, r.randrange(2 * MIB, 8 * MIB))
        elif what < 4 and size:
            write(data, r.randrange(size), b"meanwhile")

    for _ in range(8):
        write(data, r.randrange(MIB), b"before")
        with monkeypatch.context() as m:
            _meanwhile(m, change)
            copies.send()
        write(data, 0, b"after")
        copies.send()
        same(root)


def test_a_hole_that_is_filled_while_it_is_sent(root: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = root / "sparse"
    with sparse.open("wb") as f:
        for at in range(0, 4 * MIB, 64 << 10):
            f.seek(at)
            f.write(b"x" * 4096)
        f.truncate(4 * MIB)
    places = iter(range(8192, 4 * MIB, 64 << 10))

    def fill() -> None:
        for _ in range(8):
            if (at := next(places, None)) is not None:
                write(sparse, at, b"y" * 4096)

    with monkeypatch.context() as m:
        _meanwhile(m, fill)
        copies.send()
    copies.send()
    same(root)


@pytest.mark.parametrize("comes_back", [True, False])
def test_what_vanishes_before_it_could_be_sent(
    root: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    data, aside = root / "data", root.parent / "aside"
    write(data, 0, b"changed")
    send = TreeSender.send

    def sending(self: TreeSender, item: Item, hard_link_to: bytes | None = None) -> bool:
        if item.path == b"data":
            data.rename(aside)
        return send(self, item, hard_link_to)

    with monkeypatch.context() as m:
        m.setattr(TreeSender, "send", sending)
        copies.send()
    if comes_back:
        aside.rename(data)
    copies.send()
    same(root)


@pytest.mark.parametrize("size", [LEAST_FILE_BYTES, 255 * MIB, 256 * MIB, 257 * MIB, 1 << 30, 5 << 30, 1 << 44])
def test_size_of_blocks(size: int) -> None:
    block = Blocks(size).block_bytes
    assert PIECE_BYTES % block == 0 and block >= 16 << 10
    assert size // block <= 16384 or block == PIECE_BYTES
