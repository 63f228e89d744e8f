"""Memory that goes to the target while the container is restored there, and runs: beside what the coordinator asks for."""

from __future__ import annotations

import threading
from typing import Any

from migrate import places
from migrate.command import Held
from migrate.errors import MigrateError, Stopped, TransferFailed
from migrate.ship import Shipper

_BEGIN_S, _STOP_S = 30.0, 5.0


class Serving:
    """Sends what comes out of a descriptor, from now on, and hands back what the target asks for to who writes there.

    The connection, the descriptor and the events of `held` are its own until it has ended. When this returns the target takes it,
    or `result` says why not.
    """

    def __init__(self, shipper: Shipper, fd: int, images: str, held: Held, expected_bytes: int) -> None:
        self._held, self._shipper = held, shipper
        self._told: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._stop, self._begun = threading.Event(), threading.Event()
        self.sent_bytes = 0

        def run() -> None:
            try:
                shipper.stream_memory(fd, images, places.LATER, self._whole, self._note, self._ask, expected_bytes)
            except (MigrateError, OSError) as e:
                self._error = e
            self._begun.set()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        self._begun.wait(_BEGIN_S)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Stopped("the memory that was to be sent later is not needed")

    def _whole(self, wait_s: float) -> int | None:
        self._go_on()
        if not self._told and self._held.has_event(wait_s):
            self._told.update(self._held.event("served", 0))
            if self._told["error"]:
                raise TransferFailed(f"the rest of the memory cannot be sent: {self._told['error']}")
        return self._told.get("written_bytes")

    def _note(self, sent_bytes: int) -> None:
        self._go_on()
        self.sent_bytes = sent_bytes

    def _ask(self, words: list[str]) -> None:
        self._begun.set()  # the other side takes it
        if words:
            self._held.say("\n".join(words))

    def running(self, wait_s: float) -> bool:
        """Wait so long for its end; say whether it goes on."""
        self._thread.join(wait_s)
        return self._thread.is_alive()

    def result(self) -> dict[str, Any]:
        """Return how much went, when it has ended. Raises: MigrateError."""
        if self._error is not None:
            raise self._error if isinstance(self._error, MigrateError) else TransferFailed(str(self._error))
        return {"pages": self._told["pages"], "content_bytes": self.sent_bytes}

    def stop(self) -> None:
        """End it before its time. Idempotent."""
        self._stop.set()
        if self.running(_STOP_S):
            self._shipper.break_off()
            self._thread.join()

    def require_good(self) -> None:
        """Raises: MigrateError when it is known that not all will be there."""
        if self._error is not None:
            self.result()
        if not self._begun.is_set():
            raise TransferFailed("the target does not take the rest of the memory")

    @property
    def is_through(self) -> bool:
        """Say whether all of it is there."""
        return not self._thread.is_alive() and self._error is None
