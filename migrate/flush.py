"""Have what was written to directories reach their storage, beside what else is done."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable

from migrate.errors import TransferFailed

# A container may stand still meanwhile.
_LONGEST_S = 30.0


class Flushing:
    """Flushes the file systems of some directories, from now on.

    Another host sees of a network's file system what the server has; and what this one still kept would go there later, over what
    was written elsewhere since.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._errors: list[OSError] = []
        self._paths = tuple(paths)
        self._thread = threading.Thread(target=self._run, daemon=True) if self._paths else None
        if self._thread is not None:
            self._thread.start()

    def _run(self) -> None:
        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
        for path in self._paths:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if syncfs(fd):
                        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
                finally:
                    os.close(fd)
            except OSError as e:
                self._errors.append(e)

    def wait(self) -> None:
        """Raises: TransferFailed when something could not be written, or not in time: its server may be gone for good."""
        if self._thread is not None:
            self._thread.join(_LONGEST_S)
            if self._thread.is_alive():
                raise TransferFailed(f"what was written to {', '.join(self._paths)} is not flushed in {_LONGEST_S:.0f} s")
        if self._errors:
            raise TransferFailed(f"what was written to {self._errors[0].filename} cannot be flushed: {self._errors[0].strerror}")
