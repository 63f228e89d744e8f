"""The runtime under test in a mount namespace where the cgroups are mounted otherwise."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.oci import Oci


class Elsewhere(Oci):
    """Runs every verb in a mount namespace with another cgroup mount."""

    def __init__(self, root: Path, holder: int) -> None:
        super().__init__(root)
        self._enter = ["nsenter", "-t", str(holder), "-m"]

    def argv(self, *args: str | Path, before: tuple[str, ...] = ()) -> list[str]:
        return [*self._enter, *super().argv(*args, before=before)]


@contextlib.contextmanager
def mounted(script: str, root: Path) -> Iterator[Elsewhere]:
    """Give a runtime with its state at `root`, in a new mount namespace that a shell script prepared."""
    whole = f"mount --make-rprivate / && {{ {script}; }} && echo ready && exec sleep 1000"
    holder = subprocess.Popen(["unshare", "-m", "sh", "-c", whole], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "ready\n"
        oci = Elsewhere(root, holder.pid)
        yield oci
        oci.delete_all()
    finally:
        holder.kill()
        holder.wait()
