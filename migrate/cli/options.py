"""Options that several verbs share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def milliseconds(text: str) -> float:
    """Read a time. Raises: click.BadParameter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)?", text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r} is no time such as 300ms or 1.5s")
    return float(found[1]) * (1000 if found[2] == "s" else 1)


def remote_option(f: F) -> F:
    """Add how Ferry is called on other hosts."""
    return click.option(
        "--remote-command",
        default=lambda: os.environ.get("FERRY_REMOTE_COMMAND", "migrate"),
        help="How `migrate` is called on the other host (default: migrate, from the PATH that sshd gives).",
    )(f)


def json_option(f: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(f)


def from_option(f: F) -> F:
    """Add which host is meant, where it is not this one."""
    return click.option(
        "--from",
        "source",
        metavar="HOST",
        default="-",
        help="The host that the container is on, or came from (default: this one).",
    )(f)


def move_options(f: F) -> F:
    """Add what `move` and `check` have in common."""
    for option in (
        click.option("--tcp-established", is_flag=True, help="Allow open TCP connections."),
        click.option("--tcp-close", is_flag=True, help="Drop open TCP connections: they come back closed."),
        click.option("--link-remap", is_flag=True, help="Allow open files that have lost the name by which they were opened."),
        click.option("--ext-unix-sk", is_flag=True, help="Allow unix sockets that lead out of the container."),
        click.option("--shell-job", is_flag=True, help="Allow a terminal of the caller's."),
        click.option("--file-locks", is_flag=True, help="Allow file locks."),
        click.option(
            "--pre-copy",
            type=click.Choice(["auto", "always", "never"]),
            default="never",
            help="Send the memory while the container runs: when there is much of it, always, or never.",
        ),
        click.option(
            "--max-downtime",
            "max_downtime_ms",
            metavar="TIME",
            default="300ms",
            callback=lambda c, p, v: milliseconds(v),
            help="With --pre-copy: go on until this can be kept (e.g. 300ms, 1.5s), or until it does not get better.",
        ),
        click.option(
            "--ignore", metavar="CODE", multiple=True, help="Go on in spite of this finding of the preflight. May be repeated."
        ),
    ):
        f = option(f)
    return json_option(remote_option(f))
