"""What goes out: how fast, and compressed or not; and what comes in compressed."""

from __future__ import annotations

import os
import random
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import zstandard

from migrate.cli.options import bandwidth
from migrate.errors import ProtocolError, TransferFailed
from migrate.incoming import TreeReceiver
from migrate.outgoing import StreamedFile
from migrate.outlet import Choice, Compress, Outlet, Pace, Unpacker
from migrate.transport.local import FdStream
from migrate.wire import PIECE_BYTES, Wire
from migrate.wire_pb2 import EndOfFile, EndOfTree, Entry, Frame, Segment


def drive(choice: Choice, plain_rate: Callable[[int], float], packed_rate: Callable[[int], float], total: int) -> list[bool]:
    """Send so much where each way has its rate, which may change with what was sent; return which way each piece went."""
    ways = []
    for sent in range(0, total, PIECE_BYTES):
        ways.append(choice.packs)
        choice.took(PIECE_BYTES, PIECE_BYTES / (packed_rate if choice.packs else plain_rate)(sent))
    return ways


@pytest.mark.parametrize(("plain", "packed", "share"), [(100e6, 250e6, 0.85), (900e6, 300e6, 0.1)])
def test_the_faster_way_is_taken(plain: float, packed: float, share: float) -> None:
    ways = drive(Choice(Compress.AUTO), lambda _: plain, lambda _: packed, 1 << 30)
    assert (sum(ways) > share * len(ways)) == (packed > plain)
    assert 0 < sum(ways) < len(ways), "both are tried"


def test_it_is_tried_again() -> None:
    """The link gets slower on the way: from some time on it pays."""
    ways = drive(Choice(Compress.AUTO), lambda sent: 900e6 if sent < 1 << 30 else 50e6, lambda _: 200e6, 3 << 30)
    assert sum(ways[: 1 << 11]) < 1 << 9 and sum(ways[-1 << 11 :]) > 3 << 9


@pytest.mark.parametrize("mode", [Compress.ZSTD, Compress.NONE])
def test_what_was_asked_for_is_done(mode: Compress) -> None:
    assert set(drive(Choice(mode), lambda _: 1e9, lambda _: 1e6, 1 << 29)) == {mode == Compress.ZSTD}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds < 2.5, "nobody hears of it for long"
        self.now += seconds


def test_pace() -> None:
    clock = Clock()
    pace = Pace(1e6, clock, clock.sleep)
    for _ in range(100):
        pace.sent(50_000)
    assert clock.now == pytest.approx(5.0, abs=0.2), "on average"
    clock.now += 60  # a pause is not made up for
    for _ in range(100):
        pace.sent(50_000)
    assert clock.now == pytest.approx(70.0, abs=0.3)
    pace.lift()
    pace.sent(1 << 30)
    assert clock.now == pytest.approx(70.0, abs=0.3)


def test_what_the_link_carries_is_seen_first() -> None:
    """Before it is paid for, and not with a limit that lets too little through."""
    clock = Clock()
    pace = Pace(30e6, clock, clock.sleep)
    for _ in range(160):
        pace.sent(PIECE_BYTES)
    assert clock.now == 0.0 and pace.free == 160 * PIECE_BYTES
    pace.sent(PIECE_BYTES)
    assert clock.now == pytest.approx(161 * PIECE_BYTES / 30e6, abs=0.2)
    assert Pace(1e6, clock, clock.sleep).free == 2_000_000 and Pace(0, clock, clock.sleep).free == 0


@pytest.mark.parametrize(
    ("text", "rate"),
    [("0", 0), ("50M", 50e6), ("50MB/s", 50e6), ("80MiB", 80 << 20), ("400Mbit", 50e6), ("1Gbit/s", 125e6), ("1.5g", 1.5e9), ("200k", 2e5)],
)  # fmt: skip
def test_rates_are_read(text: str, rate: float) -> None:
    assert bandwidth(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-5M", "1", "5kbit", "1e9", "10T", "5 M M", "400Mbps", "400Mb"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(click.BadParameter):
        bandwidth(text)


class _Pipe:
    """Both ends of a wire, over a file."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()
        self.end = FdStream(os.dup(self.file.fileno()), os.dup(self.file.fileno()), "the file")

    def arrived(self, root: Path) -> None:
        """Have all that was written received in a directory."""
        self.file.seek(0)
        receiver = TreeReceiver(root)
        try:
            receiver.receive(Wire(self.end))
        finally:
            receiver.close()
            self.end.close()
            self.file.close()


ENTRY = Entry(path=b"file", mode=stat.S_IFREG | 0o644)


@pytest.mark.parametrize("mode", [Compress.ZSTD, Compress.NONE])
def test_there_and_back(tmp_path: Path, mode: Compress) -> None:
    pipe, r = _Pipe(), random.Random(1)
    pieces = [bytes(PIECE_BYTES), r.randbytes(PIECE_BYTES), b"words " * 1000, b"x"]
    outlet = Outlet(Wire(pipe.end), mode)
    file = StreamedFile(outlet, ENTRY)
    for piece in pieces:
        file.send(memoryview(piece))
    file.end()
    outlet.wire.send(Frame(end_of_tree=EndOfTree(entries=1)))
    pipe.arrived(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    # What does not get smaller goes as it is.
    assert (outlet.wire.sent_bytes < 1.2 * PIECE_BYTES) == (mode == Compress.ZSTD)


def _bomb(claimed: int | None) -> bytes:
    """A gigabyte of nothing, in a frame whose head says so, or says nothing, or lies."""
    packer = zstandard.ZstdCompressor(level=1, write_content_size=claimed is not None)
    if claimed is None:
        maker = packer.compressobj()
        return b"".join(maker.compress(bytes(1 << 20)) for _ in range(1024)) + maker.flush()
    frame = bytearray(packer.compress(bytes(1 << 20)))
    # The size is four bytes, after the magic number and the descriptor.
    assert zstandard.frame_content_size(bytes(frame)) == 1 << 20 and frame[4] >> 6 == 2
    at = 5 if frame[4] & 0x20 else 6
    frame[at : at + 4] = claimed.to_bytes(4, "little")
    return bytes(frame)


@pytest.mark.parametrize("data", [_bomb(None), _bomb(4096), _bomb(0xFFFFFFFF), b"", b"nothing", b"\x28\xb5\x2f\xfd"])
@pytest.mark.parametrize("length", [0, 1, 4096, PIECE_BYTES, 1 << 20, 0xFFFFFFFF, 1 << 63])
def test_pieces_that_lie(data: bytes, length: int) -> None:
    with pytest.raises(ProtocolError):
        Unpacker().unpack(memoryview(data), length)


def test_a_packed_piece_that_was_damaged(tmp_path: Path) -> None:
    pipe = _Pipe()
    wire = Wire(pipe.end)
    wire.send(Frame(entry=ENTRY))
    data = zstandard.ZstdCompressor(level=1).compress(b"other words")
    wire.send(Frame(segment=Segment(offset=0, length=11, packed=True)))
    wire.send_raw(memoryview(data))
    wire.send(Frame(end_of_file=EndOfFile(digest=bytes(16))))
    with pytest.raises(TransferFailed, match="digest"):
        pipe.arrived(tmp_path)
