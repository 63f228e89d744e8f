"""One direction of a stream over several connections: its bytes go round over them, STRIPE_BYTES at a time.

    byte 0 ... STRIPE_BYTES-1      connection 0
    the next STRIPE_BYTES          connection 1, and so on; after the last one, connection 0 again

Where a byte goes follows from its place alone, so that nothing is added to it, and nothing waits for anything but the next byte.
What comes back comes over connection 0 as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

from migrate.transport.local import FdStream
from migrate.wire import PIECE_BYTES

STRIPE_BYTES = PIECE_BYTES


class _Place:
    """How far a stream is."""

    def __init__(self, count: int) -> None:
        self._count, self._position = count, 0

    @property
    def lane(self) -> int:
        return self._position // STRIPE_BYTES % self._count

    @property
    def left(self) -> int:
        """How many bytes go to this lane before the next one's turn."""
        return STRIPE_BYTES - self._position % STRIPE_BYTES

    def went_on(self, count: int) -> None:
        self._position += count


class Sending:
    """A stream that writes over all of `lanes`, and reads from the first. It owns none of them. All raise ConnectionLost."""

    def __init__(self, lanes: Sequence[FdStream]) -> None:
        self._lanes, self._place = lanes, _Place(len(lanes))

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            part = view[: self._place.left]
            self._lanes[self._place.lane].write(part)
            self._place.went_on(len(part))
            view = view[len(part) :]

    def read_into(self, buffer: memoryview) -> None:
        self._lanes[0].read_into(buffer)

    def read_some(self, buffer: memoryview) -> int:
        return self._lanes[0].read_some(buffer)

    def close(self) -> None:
        """Close all of them: the other side finds the end of each."""
        for lane in self._lanes:
            lane.close()


class Receiving:
    """The other end of Sending."""

    def __init__(self, lanes: Sequence[FdStream]) -> None:
        self._lanes, self._place = lanes, _Place(len(lanes))

    def read_into(self, buffer: memoryview) -> None:
        while buffer:
            buffer = buffer[self.read_some(buffer) :]

    def read_some(self, buffer: memoryview) -> int:
        count = self._lanes[self._place.lane].read_some(buffer[: self._place.left])
        self._place.went_on(count)
        return count

    def write(self, data: bytes | memoryview) -> None:
        self._lanes[0].write(data)

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
