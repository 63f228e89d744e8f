"""Logging on runc's terms: `--log FILE`, `--log-format text|json`, `--debug`; errors always reach stderr too.

The standard `logging` module costs 10 ms of start-up, as much as a verb's own work, so this one does without.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TextIO

_file: TextIO | None = None
_json = False
_debug = False


def configure(path: str | None, fmt: str, debug: bool) -> None:
    """Send log entries to `path` (stderr when None).

    Raises: OSError where the file cannot be opened for appending.
    """
    global _file, _json, _debug
    _json, _debug = fmt == "json", debug
    if path:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        _file = os.fdopen(fd, "w")


def _write(level: str, message: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if _json:
        line = json.dumps({"level": level, "msg": message, "time": stamp})
    else:
        line = f'time="{stamp}" level={level} msg={json.dumps(message)}'
    print(line, file=_file or sys.stderr, flush=True)


def debug(message: str) -> None:
    if _debug:
        _write("debug", message)


def warning(message: str) -> None:
    _write("warning", message)


def error(message: str) -> None:
    """Log the error that ends the verb; with a log file it is printed on stderr as well, as tools expect."""
    _write("error", message)
    if _file is not None:
        print(f"runtime: {message}", file=sys.stderr)


def only_to_file(message: str) -> None:
    """Log an error whose words the user has seen already."""
    if _file is not None:
        _write("error", message)
