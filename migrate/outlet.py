"""Where the content of files goes out: not faster than it may, and compressed where that pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum

import zstandard

from migrate.errors import ProtocolError
from migrate.wire import PIECE_BYTES, Wire
from migrate.wire_pb2 import Frame, Segment

# The fastest that zstd has in its ordinary range: what a core compresses by it is more than a gigabit link carries.
_LEVEL = 1
# Compressed to more than this it is sent as it is: the other side has less to do.
_WORTH_IT = 0.9
# A pause is made up for by this much at most. Units: seconds.
_BURST_S = 0.1
# What pipes, ssh and sockets take in before the link has carried anything; and up to where what it carries is then measured.
_BUFFERED_BYTES, _MEASURED_BYTES, _LEAST_MEASURED_BYTES = 12 << 20, 40 << 20, 8 << 20
# For how long nothing may be sent afterwards. Units: seconds.
_MOST_DEBT_S = 2.0


class Compress(StrEnum):
    AUTO = "auto"
    ZSTD = "zstd"
    NONE = "none"


class Choice:
    """Finds out by trying which is faster on this way, plain or compressed: each is measured, the better one used for a while.

    Units: bytes of plain content. What lies in the buffers between here and the link makes the first of them look fast: it is not
    counted.
    """

    WARM_UP, TRIAL, HOLD = 16 << 20, 8 << 20, 192 << 20

    def __init__(self, mode: Compress, connections: int = 1) -> None:
        self._mode = mode
        self.WARM_UP, self.TRIAL = self.WARM_UP * connections, self.TRIAL * connections
        self.packs = mode == Compress.ZSTD
        self._left = self.WARM_UP
        self._trial = ""  # which of the two is being measured
        self._bytes, self._seconds = 0, 0.0
        self._plain_rate = 0.0

    def took(self, count: int, seconds: float) -> None:
        """Tell what it took to send so much."""
        if self._mode != Compress.AUTO:
            return
        self._bytes += count
        self._seconds += seconds
        if self._bytes < self._left:
            return
        rate = self._bytes / max(self._seconds, 1e-9)
        if self._trial == "":
            self._begin("plain", self.TRIAL)
        elif self._trial == "plain":
            self._plain_rate = rate
            self._begin("packed", self.TRIAL)
        else:
            better = rate > self._plain_rate
            self._begin("", self.HOLD)
            self.packs = better

    def _begin(self, trial: str, left: int) -> None:
        self._trial, self._left = trial, left
        self._bytes, self._seconds = 0, 0.0
        self.packs = trial == "packed"


class Pace:
    """Waits so that no more than `rate` bytes a second go out on average; 0 is any number.

    What goes first is waited for only later: it shows what the link carries, which is what counts when the limit is lifted.
    """

    def __init__(
        self,
        rate: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        free: int = _MEASURED_BYTES,
    ) -> None:
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._due = clock()
        self.free = min(free, int(rate * _MOST_DEBT_S)) if rate else 0
        self._sent = 0

    def lift(self) -> None:
        """From here on anything goes."""
        self._rate = 0.0

    def sent(self, count: int) -> None:
        """Wait until more may be sent."""
        if not self._rate:
            return
        now = self._clock()
        self._sent += count
        self._due = max(self._due, now - _BURST_S) + count / self._rate
        if self._due > now and self._sent > self.free:
            self._sleep(self._due - now)


class Outlet:
    """Sends pieces of content over a wire, compressed or not. `bandwidth_limit` is in bytes a second, 0 is none.

    Each of the `connections` that the wire goes over has buffers of its own.
    """

    def __init__(
        self, wire: Wire, compress: Compress = Compress.NONE, bandwidth_limit: float = 0.0, connections: int = 1
    ) -> None:
        self.wire = wire
        self._pace = Pace(bandwidth_limit, free=_MEASURED_BYTES * connections)
        self._choice = Choice(compress, connections)
        self._packer = zstandard.ZstdCompressor(level=_LEVEL)
        self._buffered = _BUFFERED_BYTES * connections
        self._sent, self._measured, self._seconds = 0, 0, 0.0

    def hurry(self) -> None:
        """From here on somebody waits: there is no limit any more."""
        self._pace.lift()

    @property
    def link_rate(self) -> float | None:
        """How much content the way carries without the limit; None where there is none, or it lets too little through to see.

        Units: bytes a second.
        """
        return self._measured / max(self._seconds, 1e-6) if self._measured >= _LEAST_MEASURED_BYTES else None

    def send(self, offset: int, piece: memoryview) -> None:
        """Send what belongs at `offset`. Raises: ConnectionLost."""
        started = time.monotonic()
        data: memoryview | bytes = piece
        if self._choice.packs:
            packed = self._packer.compress(piece)
            if len(packed) < len(piece) * _WORTH_IT:
                data = packed
        self.wire.send(Frame(segment=Segment(offset=offset, length=len(piece), packed=data is not piece)))
        self.wire.send_raw(memoryview(data))
        self._sent += len(data)
        if self._buffered < self._sent <= self._pace.free:
            self._measured += len(piece)
            self._seconds += time.monotonic() - started
        # With a limit, what is smaller is sooner there, whatever the link carries.
        self._pace.sent(len(data))
        self._choice.took(len(piece), time.monotonic() - started)


class Unpacker:
    """Gives packed pieces their content again; what comes in may be hostile."""

    def __init__(self) -> None:
        self._unpacker = zstandard.ZstdDecompressor()

    def unpack(self, data: memoryview, length: int) -> memoryview:
        """Return the `length` bytes of content of a piece. Raises: ProtocolError."""
        try:
            # The size in its head is what would be set aside for it.
            if not 0 < length <= PIECE_BYTES or zstandard.frame_content_size(data) != length:
                raise ProtocolError("the other side sent a compressed piece of another length than it announced")
            content = self._unpacker.decompress(data, max_output_size=length)
        except zstandard.ZstdError as e:
            raise ProtocolError(f"the other side sent a compressed piece that is none: {e}") from e
        if len(content) != length:
            raise ProtocolError("the other side sent a compressed piece of another length than it announced")
        return memoryview(content)
