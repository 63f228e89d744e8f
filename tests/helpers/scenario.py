"""A container whose program sets something up, waits to be restored, and looks whether it is still what it was."""

from __future__ import annotations

import json
import subprocess
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.memory import system
from tests.helpers.oci import Oci, wait_for

# `park` is where the checkpoint meets the program.
_PROGRAM = """
import array, ctypes, errno, fcntl, mmap, os, resource, select, signal, socket, struct, sys, threading, time, traceback
libc = ctypes.CDLL(None, use_errno=True)
def park():
    open('/ready', 'w').close()
    while not os.path.exists('/go'):
        time.sleep(0.01)
def main():
{body}
try:
    main()
    result = 'ok'
except BaseException:
    result = traceback.format_exc()
with open('/result.new', 'w') as f:
    f.write(result)
os.rename('/result.new', '/result')
while True:
    time.sleep(1)
"""


@dataclass(frozen=True)
class Scenario:
    """`flags` are what checkpoint and restore need, `restore_flags` what the restore alone needs besides.

    `refused` is the finding without those flags.
    """

    name: str
    body: str
    flags: tuple[str, ...] = ()
    restore_flags: tuple[str, ...] = ()
    refused: str | None = None
    change: Callable[[Config], Any] | None = None

    def __str__(self) -> str:
        return self.name


class Parked:
    """A scenario's container, at the point where it waits."""

    def __init__(self, oci: Oci, bundles: BundleMaker, scenario: Scenario, prepare: Callable[[Path], Any] | None = None) -> None:
        def change(config: Config) -> None:
            system(config)
            if scenario.change:
                scenario.change(config)

        body = textwrap.indent(textwrap.dedent(scenario.body), "    ")
        self.oci, self.scenario = oci, scenario
        self.bundle = bundles("/usr/bin/python3", "-c", _PROGRAM.format(body=body), change=change)
        self.rootfs = self.bundle / "rootfs"
        self.rootfs.chmod(0o777)
        (self.rootfs / "tmp").chmod(0o1777)
        if prepare:
            prepare(self.rootfs)
        oci.detached(self.bundle, "c")
        wait_for(lambda: (self.rootfs / "ready").exists() or (self.rootfs / "result").exists(), "the set-up", 60)
        assert not (self.rootfs / "result").exists(), (self.rootfs / "result").read_text()

    def findings(self, *flags: str) -> dict[str, str]:
        """Return code -> severity of what a checkpoint with these flags would meet."""
        done = self.oci.run("checkpoint", "--check", "--json", *flags, "c")
        assert done.returncode in (0, 4), done.stderr
        return {f["code"]: f["severity"] for f in json.loads(done.stdout)}

    def restore(self, images: Path, *options: str | Path, container: str = "c") -> None:
        null = subprocess.DEVNULL
        argv = ["restore", "--detach", "--image-path", images, "--bundle", self.bundle]
        argv += [*self.scenario.flags, *self.scenario.restore_flags, *options, container]
        done = self.oci.run(*argv, stdout=null, stderr=null)
        if done.returncode:
            log = (images / "restore.log").read_text() if (images / "restore.log").exists() else ""
            raise AssertionError(f"restore: {[line for line in log.splitlines() if 'rror' in line]}")

    def looks(self) -> None:
        """Have the program look at what it has, and see that it finds all as it was."""
        (self.rootfs / "go").touch()
        result = self.rootfs / "result"
        wait_for(result.exists, "the program's look", 30)
        assert result.read_text() == "ok"
