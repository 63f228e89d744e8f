"""The `runtime` command: how a host is asked about its containers, and how a container is held.

`migrate` runs it as a command on every host, its own included: namespaces cannot be entered by a process with
threads, and a runtime that is driven by its command line can be another one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from migrate.errors import RuntimeFailed

_TIMEOUT_S, _CHECK_S = 60.0, 270.0
_NOT_READY = 4  # exit status of `runtime checkpoint --check`


def runtime_command() -> list[str]:
    """Return the command: $FERRY_RUNTIME, else the runtime that is installed beside this program."""
    named = os.environ.get("FERRY_RUNTIME")
    return [named] if named else [str(Path(sys.executable).with_name("runtime"))]


def run(*arguments: str, timeout_s: float = _TIMEOUT_S, given: str | None = None, ok: tuple[int, ...] = (0,)) -> str:
    """Run one verb, with `given` as its input; return what it printed. Raises: RuntimeFailed with the runtime's own words."""
    argv = [*runtime_command(), "--log-format", "json", *arguments]
    try:
        done = subprocess.run(argv, input=given or "", capture_output=True, text=True, timeout=timeout_s, check=False)
    except OSError as e:
        raise RuntimeFailed(f"cannot run {argv[0]}: {e.strerror}", hint="is Ferry installed there?") from e
    except subprocess.TimeoutExpired as e:
        raise RuntimeFailed(f"runtime {arguments[0]} did not end in {timeout_s:.0f} s") from e
    if done.returncode not in ok:
        raise RuntimeFailed(f"runtime {arguments[0]}: {said(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def said(stderr: str) -> str:
    """Return the message of the last error in the runtime's JSON log."""
    for line in reversed(stderr.splitlines()):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return str(json.loads(line)["msg"])
    return stderr.strip()


def state(container: str) -> dict[str, Any] | None:
    """Return the state document of a container, None where there is no such container. Raises: RuntimeFailed."""
    try:
        document: dict[str, Any] = json.loads(run("state", container))
    except RuntimeFailed as e:
        if "does not exist" in e.message:
            return None
        raise
    return document


def check(container: str, flags: list[str]) -> list[dict[str, str]]:
    """Return what would stand in the way of a checkpoint, as the runtime finds it. Raises: RuntimeFailed."""
    arguments = ("checkpoint", "--check", "--json", *flags, container)
    found: list[dict[str, str]] = json.loads(run(*arguments, timeout_s=_CHECK_S, ok=(0, _NOT_READY)))
    return found


class Held:
    """A `runtime checkpoint --hold` or `runtime restore --hold`: the protocol is in runtime/criu/hold.py.

    It inherits `inherited` descriptors. Raises (constructor): RuntimeFailed.
    """

    def __init__(self, arguments: list[str], container: str, inherited: tuple[int, ...] = ()) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._what = f"runtime {arguments[0]}"
        argv = [*runtime_command(), *arguments, "--hold", "--control-fd", str(theirs.fileno()), container]
        try:
            # Its stdio becomes the restored container's: not our streams.
            self._process = subprocess.Popen(
                argv,
                pass_fds=(theirs.fileno(), *inherited),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as e:
            ours.close()
            raise RuntimeFailed(f"cannot run {argv[0]}: {e.strerror}", hint="is Ferry installed there?") from e
        finally:
            theirs.close()
        self._sock, self._buffer = ours, b""

    def say(self, word: str) -> None:
        """Say go, commit or abort; one that is gone is found out when its event is awaited."""
        with contextlib.suppress(OSError):
            self._sock.sendall(word.encode() + b"\n")

    def has_event(self, timeout_s: float) -> bool:
        """Wait for something to read; say whether there is."""
        return b"\n" in self._buffer or bool(select.select([self._sock], [], [], timeout_s)[0])

    def event(self, expected: str, timeout_s: float) -> dict[str, Any]:
        """Wait for an event. Raises: RuntimeFailed with the error that it reports instead, or when it is gone or late."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._sock], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeFailed(f"{self._what} did not get as far as '{expected}' in {timeout_s:.0f} s")
            with contextlib.suppress(ConnectionResetError):
                if data := self._sock.recv(65536):
                    self._buffer += data
                    continue
            raise RuntimeFailed(f"{self._what} ended with status {self._process.wait()} before '{expected}'")
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "error":
            error = event["error"]
            message = "\n  ".join([f"{self._what}: {error['message']}", *error.get("log_lines", ())])
            raise RuntimeFailed(message, hint=error.get("hint"))
        if event["event"] != expected:
            raise RuntimeFailed(f"{self._what}: {event.get('reason') or event['event']}")
        return event

    def alive(self) -> bool:
        """Say whether the process is there still; one that is ending gets a moment for it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        return self._process.poll() is None

    def running(self) -> bool:
        """Say whether the process is there, at this moment."""
        return self._process.poll() is None

    def end(self, timeout_s: float = 600.0) -> bool:
        """Close the control connection, by which an undecided one aborts, and see the process end. Idempotent.

        A dump that is under way is first finished, which takes as long as its memory is large. Return False when the
        process had to be killed.
        """
        self._sock.close()
        try:
            self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
        return True
