"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from runtime.errors import ContainerError, KernelError
from runtime.linux.terminal import send_master

F = TypeVar("F", bound=Callable[..., Any])


def launch_options(f: F) -> F:
    """Add what `create`, `run` and `restore` have in common."""
    for option in (
        click.option("-b", "--bundle", type=click.Path(path_type=Path), default=Path(), help="Directory of the bundle."),
        click.option("--console-socket", help="Unix socket that receives the master of the terminal."),
        click.option("--pid-file", help="File for the pid of the container's first process."),
        click.option("--no-pivot", is_flag=True, help="Do not use pivot_root (for a rootfs on ramfs)."),
        click.option("--no-new-keyring", is_flag=True, help="Do not make a new session keyring."),
        click.option("--preserve-fds", type=click.IntRange(0), default=0, help="Pass this many more descriptors on."),
    ):
        f = option(f)
    return f


def console_sender(console_socket: str | None) -> Callable[[int], None] | None:
    """Return what gives a terminal's master to the listener on a socket, or None without a socket."""
    if console_socket is None:
        return None

    def send(master: int) -> None:
        try:
            send_master(console_socket, master, os.ttyname(master) if os.isatty(master) else "console")
        except OSError as e:
            raise KernelError(f"cannot send the terminal to --console-socket {console_socket}", e.errno or 0) from e
        finally:
            os.close(master)

    return send


def signal_number(text: str) -> int:
    """Read `TERM`, `SIGTERM` or `15`. Raises: ContainerError."""
    import signal

    if text.isdigit() and int(text) in signal.valid_signals():
        return int(text)
    name = text.upper().removeprefix("SIG")
    try:
        return signal.Signals[f"SIG{name}"]
    except KeyError:
        raise ContainerError(f"unknown signal {text!r}", hint="give a name such as TERM, or a number") from None
