"""Hooks: programs that run around a container's life, with its state on stdin.

Source: OCI runtime specification 1.2, config.md, POSIX-platform Hooks.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from typing import Any, NoReturn

from runtime.errors import HookFailed
from runtime.files import write_all
from runtime.linux import execstub
from runtime.spec.config import Hook

_MAX_OUTPUT_BYTES = 1 << 16


def run_hooks(hooks: tuple[Hook, ...], name: str, state: dict[str, Any], cwd: str | None = None) -> None:
    """Run hooks of the host's in order; the first failure ends it.

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
            raise _too_long(hook, name) from e
        except OSError as e:
            raise HookFailed(f"{name} hook {hook.path} cannot be run: {e.strerror}") from e
        _check(hook, name, done.returncode, done.stdout)


def run_inside(hooks: tuple[Hook, ...], name: str, state: dict[str, Any]) -> None:
    """Run hooks that are programs of the container's: by the stub, as all that we execute there.

    Raises: HookFailed.
    """
    for hook in hooks:
        status, output = _run_by_stub(hook, name, json.dumps(state).encode())
        _check(hook, name, status, output)


def _check(hook: Hook, name: str, status: int, output: bytes) -> None:
    if status:
        text = output.decode(errors="replace").strip()
        raise HookFailed(f"{name} hook {hook.path} failed with status {status}: {text or 'no output'}")


def _too_long(hook: Hook, name: str) -> HookFailed:
    return HookFailed(f"{name} hook {hook.path} took longer than its timeout of {hook.timeout_s} s")


def _run_by_stub(hook: Hook, name: str, document: bytes) -> tuple[int, bytes]:
    stdin, feed = os.pipe2(os.O_CLOEXEC)
    collect, stdout = os.pipe2(os.O_CLOEXEC)
    failure, error = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _become(hook, stdin, stdout, error)
    for fd in (stdin, stdout, error):
        os.close(fd)
    try:
        with contextlib.suppress(BrokenPipeError):
            write_all(feed, document)
        os.close(feed)
        output = _read(collect, None if hook.timeout_s is None else time.monotonic() + hook.timeout_s)
        if output is None:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if output is None:
            raise _too_long(hook, name)
        number = os.read(failure, 4)
        if number:
            raise HookFailed(f"{name} hook {hook.path} cannot be run: {os.strerror(int.from_bytes(number, 'little'))}")
        return status, output
    finally:
        os.close(collect)
        os.close(failure)


def _become(hook: Hook, stdin: int, stdout: int, error: int) -> NoReturn:
    try:
        for fd, place in ((stdin, 0), (stdout, 1), (stdout, 2)):
            os.dup2(fd, place)
        os.set_inheritable(error, True)
        stub = execstub.make(hook.path, error)
        vector = execstub.Vector(hook.args or (hook.path,), [e for e in hook.env if "=" in e])
        if stub is None:
            os.execve(hook.path, hook.args or (hook.path,), dict(e.split("=", 1) for e in hook.env if "=" in e))
        execstub.execute(stub, vector)
    except OSError as e:
        os.write(error, (e.errno or 0).to_bytes(4, "little"))
    finally:
        os._exit(126)


def _read(fd: int, deadline: float | None) -> bytes | None:
    """Read to the end; None when that does not come in time."""
    output = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        left_ms = None if deadline is None else max(0.0, 1000 * (deadline - time.monotonic()))
        if not poll.poll(left_ms):
            return None
        data = os.read(fd, 65536)
        if not data:
            return output
        output = (output + data)[:_MAX_OUTPUT_BYTES]
