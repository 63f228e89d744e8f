"""The pure part of copying memory, against models that are sets and dicts of pages."""

from __future__ import annotations

import ctypes
import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ContainerError
from runtime.memory import passes, records, spans
from runtime.memory.filler import _Pieces
from runtime.memory.passes import Passes, Piece
from runtime.memory.records import PAGE_BYTES, Region

# Few pages, so that runs meet, overlap and surround each other.
runs = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda r: (r[0] * PAGE_BYTES, (r[0] + r[1]) * PAGE_BYTES)))


def pages(found: list[tuple[int, int]]) -> set[int]:
    return {at for start, end in found for at in range(start, end, PAGE_BYTES)}


@given(runs, runs)
def test_spans(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    joined, other = spans.union(left), spans.union(right)
    assert pages(joined) == pages(left)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(joined))
    rest = spans.minus(joined, other)
    assert pages(rest) == pages(left) - pages(right)
    assert spans.size(rest) == len(pages(rest)) * PAGE_BYTES


def content(pieces: list[Piece]) -> dict[int, int]:
    found = {}
    for start, end, place in pieces:
        for at in range(start, end, PAGE_BYTES):
            assert at not in found, "a page twice"
            found[at] = place + at - start
    return found


@given(st.lists(runs.map(spans.union)), runs)
def test_the_last_pass_counts(written: list[list[tuple[int, int]]], wanted: list[tuple[int, int]]) -> None:
    model: dict[int, int] = {}
    found: list[Piece] = []
    place = 0
    for one in written:
        new = []
        for start, end in one:
            new.append((start, end, place))
            model |= {at: place + at - start for at in range(start, end, PAGE_BYTES)}
            place += end - start
        found = sorted(new + passes.without(found, new))
    assert content(found) == model
    chosen = spans.union(wanted)
    assert content(passes.clip(found, chosen)) == {at: c for at, c in model.items() if at in pages(chosen)}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5))))
def test_layers_do_not_overlap(written: list[tuple[int, int]]) -> None:
    pieces = [(start, start + length, i * 100) for i, (start, length) in enumerate(written)]
    found = passes.layers(pieces)
    assert [p for layer in found for p in layer] == pieces
    assert all(a[1] <= b[0] for layer in found for a, b in itertools.pairwise(layer))


@given(runs, runs, st.integers(0, 40))
def test_what_a_process_still_lacks(filled: list[tuple[int, int]], dropped: list[tuple[int, int]], at: int) -> None:
    pieces = _Pieces([(a, b, a + (1 << 30)) for a, b in spans.union(filled)])
    lost: set[int] = set()
    for start, end in dropped:
        assert set(content(pieces.of_content(start + (1 << 30), end + (1 << 30)))) == set(content(pieces.within(start, end)))
        lost |= set(content(pieces.drop(start, end)))
    assert lost == pages(filled) & pages(dropped)
    address = at * PAGE_BYTES
    found = pieces.find(address)
    if address in pages(filled) - pages(dropped):
        assert found is not None and (found[0], found[2]) == (address, address + (1 << 30))
    else:
        assert found is None


@given(st.integers(1, 1 << 22), runs.map(spans.union))
def test_a_pass_comes_back(pid: int, written: list[tuple[int, int]]) -> None:
    for batch in records.batches(pid, written):
        assert len(batch) <= records.MAX_REGIONS and sum(r.pages for r in batch) <= records.MAX_PAGES
        assert records.parse(records.head(batch)) == batch
    assert pages([(r.start, r.end) for b in records.batches(pid, written) for r in b]) == pages(written)


def test_a_large_run_is_cut() -> None:
    batches = list(records.batches(1, [(0, 3000 * PAGE_BYTES)]))
    assert [sum(r.pages for r in b) for b in batches] == [1024, 1024, 952]


@given(st.binary(max_size=100).map(lambda b: b.ljust(PAGE_BYTES, b"\0")) | st.integers(0, 200).map(lambda at: _flipped(at)))
def test_a_head_that_lies(data: bytes) -> None:
    try:
        regions = records.parse(data)
    except ValueError:
        return
    assert all(r.pages and r.pid and r.start % PAGE_BYTES == 0 for r in regions)


def _flipped(at: int) -> bytes:
    good = bytearray(records.head([Region(1, PAGE_BYTES, 3), Region(1, 9 * PAGE_BYTES, 1)]))
    good[at] ^= 0xFF
    return bytes(good)


@given(st.lists(runs.map(spans.union).filter(bool), min_size=1, max_size=5), st.integers(0, 5))
def test_the_newest_content_is_found(written: list[list[tuple[int, int]]], together: int) -> None:
    """Of every page what the last pass had of it, in runs; also where some passes were brought together before."""
    newest: dict[int, bytes] = {}
    with tempfile.TemporaryDirectory() as name:
        found = Passes(Path(name))
        for number, spans_of in enumerate(written, 1):
            data = b""
            for batch in records.batches(7, spans_of):
                data += records.head(batch) + bytes([number]) * (sum(r.pages for r in batch) * PAGE_BYTES)
            (Path(name) / records.name(number)).write_bytes(data + records.END)
            newest.update(dict.fromkeys(pages(spans_of), bytes([number])))
            if number == together:
                found.look()
                found.bring_together()
        found.look()
        assert pages(found.covered(7)) == set(newest)
        for address in range(0, 64 * PAGE_BYTES, PAGE_BYTES):
            located = found.locate(7, address)
            assert (located is not None) == (address in newest)
            if located is not None:
                run = {newest[a] for a in range(address, located[1], PAGE_BYTES)}
                assert run == {ctypes.string_at(located[0], 1)} == {ctypes.string_at(located[0] + located[1] - address - 1, 1)}


def test_what_newer_passes_have_takes_no_space(tmp_path: Path) -> None:
    for number in range(1, 4):
        data = b"".join(
            records.head(b) + bytes([number]) * (1024 * PAGE_BYTES) for b in records.batches(7, [(0, 1024 * PAGE_BYTES)])
        )
        (tmp_path / records.name(number)).write_bytes(data + records.END)
    found = Passes(tmp_path)
    found.look()
    found.bring_together(free=True)
    taken = [(tmp_path / records.name(n)).stat().st_blocks * 512 for n in range(1, 4)]
    assert max(taken[:2]) <= 4 * PAGE_BYTES and taken[2] >= 1024 * PAGE_BYTES
    located = found.locate(7, 5 * PAGE_BYTES)
    assert located is not None and ctypes.string_at(located[0], 1) == b"\3"
    again = Passes(tmp_path)
    again.look()
    assert again.covered(7) == [(0, 1024 * PAGE_BYTES)], "the passes can be read still"


def test_passes_on_disk(tmp_path: Path) -> None:
    first, second, third = (bytes([n]) * PAGE_BYTES for n in b"abc")
    whole = records.head([Region(7, 0, 2)]) + first + second + records.END
    (tmp_path / "memory-1.img").write_bytes(whole)
    (tmp_path / "memory-2.img").write_bytes(records.head([Region(7, PAGE_BYTES, 1)]) + third + records.END)
    found = Passes(tmp_path)
    found.look(but_last=True)
    assert spans.size(p[:2] for p in found.pieces(7, [(0, 9 * PAGE_BYTES)])) == 2 * PAGE_BYTES
    found.look()
    assert spans.size(p[:2] for p in found.pieces(7, [(0, 9 * PAGE_BYTES)])) == 2 * PAGE_BYTES
    assert found.pieces(8, [(0, 9 * PAGE_BYTES)]) == []
    for cut in (0, 10, PAGE_BYTES, len(whole) - PAGE_BYTES, len(whole) - 1):
        (tmp_path / "memory-3.img").write_bytes(whole[:cut])
        with pytest.raises(ContainerError, match="memory-3"):
            Passes(tmp_path).look()
