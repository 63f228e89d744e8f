"""One direction of a stream over several connections: its bytes go round over them, STRIPE_BYTES at a time.

    byte 0 ... STRIPE_BYTES-1      connection 0
    the next STRIPE_BYTES          connection 1, and so on; after the last one, connection 0 again

Where a byte goes follows from its place alone, so that nothing is added to it, and nothing waits for anything but the next byte.
What comes back comes over connection 0 as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from migrate.transport.local import FdStream
from migrate.wire import PIECE_BYTES

STRIPE_BYTES = PIECE_BYTES


class _Striped:
    """Several connections, and how far the stream over them is."""

    def __init__(self, lanes: Sequence[FdStream]) -> None:
        self._lanes, self._position = lanes, 0

    def _turn(self) -> tuple[FdStream, int]:
        """Return whose turn it is, and for how many bytes."""
        lane = self._lanes[self._position // STRIPE_BYTES % len(self._lanes)]
        return lane, STRIPE_BYTES - self._position % STRIPE_BYTES

    @property
    def timeout_s(self) -> float | None:
        return self._lanes[0].timeout_s

    @timeout_s.setter
    def timeout_s(self, timeout_s: float | None) -> None:
        for lane in self._lanes:
            lane.timeout_s = timeout_s

    @property
    def patient(self) -> Callable[[], bool] | None:
        return self._lanes[0].patient

    @patient.setter
    def patient(self, patient: Callable[[], bool] | None) -> None:
        for lane in self._lanes:
            lane.patient = patient

    def close(self) -> None:
        """Close all of them: the other side finds the end of each. Idempotent."""
        for lane in self._lanes:
            lane.close()


class Sending(_Striped):
    """A stream that writes over all of its connections, and reads from the first. All raise ConnectionLost."""

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            lane, left = self._turn()
            part = view[:left]
            lane.write(part)
            self._position += len(part)
            view = view[len(part) :]

    def read_into(self, buffer: memoryview) -> None:
        self._lanes[0].read_into(buffer)

    def read_some(self, buffer: memoryview) -> int:
        return self._lanes[0].read_some(buffer)


class Receiving(_Striped):
    """The other end of Sending."""

    def read_into(self, buffer: memoryview) -> None:
        while buffer:
            buffer = buffer[self.read_some(buffer) :]

    def read_some(self, buffer: memoryview) -> int:
        lane, left = self._turn()
        count = lane.read_some(buffer[:left])
        self._position += count
        return count

    def write(self, data: bytes | memoryview) -> None:
        self._lanes[0].write(data)
