"""Hooks: programs that run around a container's life, with its state on stdin.

Source: OCI runtime specification 1.2, config.md, POSIX-platform Hooks.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from runtime.errors import HookFailed
from runtime.spec.config import Hook


def run_hooks(hooks: tuple[Hook, ...], name: str, state: dict[str, Any], cwd: str | None = None) -> None:
    """Run hooks in order; the first failure ends it.

    Raises: HookFailed with the hook's path, its exit status and what it printed.
    """
    for hook in hooks:
        try:
            done = subprocess.run(
                hook.args or (hook.path,),
                executable=hook.path,
                env=dict(e.split("=", 1) for e in hook.env if "=" in e),
                input=json.dumps(state).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=hook.timeout_s,
                cwd=cwd,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise HookFailed(f"{name} hook {hook.path} took longer than its timeout of {hook.timeout_s} s") from e
        except OSError as e:
            raise HookFailed(f"{name} hook {hook.path} cannot be run: {e.strerror}") from e
        if done.returncode:
            output = done.stdout.decode(errors="replace").strip()
            raise HookFailed(f"{name} hook {hook.path} failed with status {done.returncode}: {output or 'no output'}")
