"""Two hosts with a kernel each, by scripts/vms; everything on them is done over ssh."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

from tests.helpers.bed import ROOT

NODES = ("node1", "node2")


class Vms:
    def __init__(self, name: str) -> None:
        self.name = name

    def _vms(self, *args: str, timeout_s: float = 600) -> None:
        subprocess.run([str(ROOT / "scripts/vms"), self.name, *args], stdin=subprocess.DEVNULL, check=True, timeout=timeout_s)

    def up(self) -> None:
        # The first time on a machine, the image is built and a guest boots.
        self._vms("up", timeout_s=1500)

    def down(self) -> None:
        self._vms("down")

    def reset(self, node: str) -> None:
        self._vms("reset", node)

    def run(self, node: str, *args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on a node and return what came of it."""
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, **kwargs}
        argv = [str(ROOT / "scripts/vms"), self.name, "ssh", node, shlex.join(args)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=900, check=False, **options)

    def ok(self, node: str, *args: str, **kwargs: Any) -> str:
        """Run a command that must succeed; return its output."""
        done = self.run(node, *args, **kwargs)
        assert done.returncode == 0, f"{node}# {' '.join(args)}: status {done.returncode}: {done.stdout}{done.stderr}"
        return str(done.stdout)

    def shell(self, node: str, script: str) -> str:
        """Run a shell script that must succeed at every step; return its output."""
        return self.ok(node, "sh", "-ec", script)

    def put(self, directory: Path, node: str, path: str) -> None:
        """Copy a directory to where a node is to have it."""
        tar = subprocess.Popen(["tar", "-c", "-C", str(directory), "."], stdout=subprocess.PIPE)
        self.ok(node, "sh", "-ec", f"mkdir -p {path}; tar -x -C {path}", stdin=tar.stdout)
        assert tar.wait() == 0

    def detached(self, node: str, *args: str) -> None:
        """Run a verb of the runtime that leaves a container behind; its stdin is a pipe of sshd's."""
        self.shell(node, f"runtime --log /tmp/verb.log {shlex.join(args)} >/dev/null 2>&1 || {{ cat /tmp/verb.log; exit 1; }}")

    def containers(self, node: str) -> dict[str, str]:
        """Return the status of each container of a node."""
        return {c["id"]: c["status"] for c in json.loads(self.ok(node, "runtime", "list", "--format", "json")) or []}

    def clean(self) -> None:
        """Remove every container, bundle and image of both nodes."""
        for node in NODES:
            for container in self.containers(node):
                self.ok(node, "runtime", "delete", "--force", container)
            self.shell(node, "rm -rf /var/lib/ferry/bundles /var/lib/images")
