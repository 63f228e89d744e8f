"""Drives the OCI runtime under test by its command line: $RUNTIME, by default ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.bundle import assert_gapless, numbers

OURS = str(Path(sys.executable).with_name("runtime"))
# No command takes so long, even on a slow machine in an emulated guest: what does hangs.
SLOW_S = 600.0
CRIU = str(Path(sys.executable).with_name("criu"))


class Failed(AssertionError):
    """A command that should have succeeded did not; carries what it said."""


class Oci:
    def __init__(self, root: Path) -> None:
        self.command = os.environ.get("RUNTIME") or OURS
        self.root = root
        self.at_end: list[Callable[[], Any]] = []  # what must happen before containers can be deleted
        self._globals = ["--root", str(root)]
        if self.command != OURS:
            self._globals += ["--criu", CRIU]

    def argv(self, *args: str | Path, before: tuple[str, ...] = ()) -> list[str]:
        return [self.command, *self._globals, *before, *map(str, args)]

    def run(self, *args: str | Path, before: tuple[str, ...] = (), **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run a verb and return what came of it, whatever that is."""
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        options.update(kwargs)
        return subprocess.run(self.argv(*args, before=before), text=True, timeout=SLOW_S, check=False, **options)

    def ok(self, *args: str | Path, **kwargs: Any) -> str:
        """Run a verb that must succeed; return its output."""
        done = self.run(*args, **kwargs)
        if done.returncode:
            raise Failed(f"{args}: status {done.returncode}: {done.stderr}")
        return done.stdout or ""

    def detached(self, bundle: Path, container: str, *options: str) -> None:
        """Start a container in the background, its stdio at /dev/null."""
        null = subprocess.DEVNULL
        done = self.run("run", "--detach", *options, "--bundle", bundle, container, stdout=null, stderr=null)
        if done.returncode:
            again = self.run("run", "--detach", *options, "--bundle", bundle, container)
            raise Failed(f"run {container}: {again.stderr}")

    def inside(self, bundle: Path, container: str = "inside") -> str:
        """Run a bundle in the foreground; return what its process printed."""
        return self.ok("run", "--bundle", bundle, container)

    def state(self, container: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.ok("state", container))
        return document

    def status(self, container: str) -> str:
        return str(self.state(container)["status"])

    def wait_status(self, container: str, status: str, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while (now := self.status(container)) != status:
            assert time.monotonic() < deadline, f"{container} is {now}, not {status}"
            time.sleep(0.02)

    def delete_all(self) -> None:
        for action in self.at_end:
            action()
        if self.root.exists():
            for entry in self.root.iterdir():
                if entry.is_dir() and not entry.name.startswith("."):
                    self.run("delete", "--force", entry.name)


def wait_for(condition: Any, what: str, timeout_s: float = 60.0) -> None:
    """Wait until a condition holds; for longer than even a slow machine takes, since only what fails waits so long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.01)


def counts_on(count: Path) -> None:
    """See that a counter goes on, with neither gap nor repetition."""
    at = len(numbers(count))
    wait_for(lambda: len(numbers(count)) > at + 3, "counting")
    assert_gapless(numbers(count))
