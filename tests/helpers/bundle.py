"""BusyBox bundles for tests: the default config, changed as a test wants it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from runtime.spec.defaults import default_config

Config = dict[str, Any]


@cache
def applets() -> list[str]:
    return subprocess.run([busybox(), "--list"], capture_output=True, text=True, check=True).stdout.split()


@cache
def busybox() -> str:
    found = shutil.which("busybox")
    assert found, "busybox is not installed: scripts/install-packages"
    return found


def make_rootfs(rootfs: Path) -> None:
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "root"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy(busybox(), rootfs / "bin/busybox")
    for name in applets():
        if name != "busybox":
            (rootfs / "bin" / name).symlink_to("busybox")
    (rootfs / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000:alice:/home/alice:/bin/sh\n")
    (rootfs / "etc/group").write_text("root:x:0:\nalice:x:1000:\n")


class BundleMaker:
    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0

    def __call__(self, *args: str, change: Callable[[Config], Any] | None = None, path: Path | None = None) -> Path:
        """Make a bundle that runs `args`, without a terminal and with a writable rootfs unless `change` says otherwise."""
        self._count += 1
        bundle = path or self._directory / f"bundle{self._count}"
        bundle.mkdir(parents=True)
        make_rootfs(bundle / "rootfs")
        config = default_config()
        config["ociVersion"] = "1.0.2"  # what every runtime under test reads
        config["process"].update(terminal=False, args=list(args) or ["true"])
        config["root"]["readonly"] = False
        if change:
            change(config)
        (bundle / "config.json").write_text(json.dumps(config))
        return bundle


def counter(path: str = "/count", sleep_s: float = 0.02) -> tuple[str, ...]:
    """The command of a process that counts in its memory and appends each number to a file."""
    return ("sh", "-c", f"i=0; while :; do i=$((i+1)); echo $i >>{path}; sleep {sleep_s}; done")


def numbers(path: Path) -> list[int]:
    """Return what a counter wrote; a line that is being written does not count."""
    text = path.read_text() if path.exists() else ""
    return [int(line) for line in text[: text.rfind("\n") + 1].split()]


def assert_gapless(found: list[int]) -> None:
    assert found == list(range(1, len(found) + 1)), f"gap or repetition in {found[:3]}...{found[-3:]}"
