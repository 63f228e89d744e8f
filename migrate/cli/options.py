"""Options that several verbs share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from migrate import volume
from migrate.cli.progress import KINDS

_LEAST_RATE = 100_000
F = TypeVar("F", bound=Callable[..., Any])


def milliseconds(text: str) -> float:
    """Read a time. Raises: click.BadParameter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)?", text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r} is no time such as 300ms or 1.5s")
    return float(found[1]) * (1000 if found[2] == "s" else 1)


def bandwidth(text: str) -> float:
    """Read a rate; return it in bytes a second, 0 for none. Raises: click.BadParameter."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)(i?)(bit|B)?(?:/s)?", text.strip())
    if found is None:
        raise click.BadParameter(f"{text!r} is no rate such as 50M, 80MiB or 800Mbit (a second)")
    steps = "kmg".find(found[2].lower()) + 1 if found[2] else 0
    unit: int = (1024 if found[3] else 1000) ** steps
    rate = float(found[1]) * unit / (8 if found[4] == "bit" else 1)
    if 0 < rate < _LEAST_RATE:
        raise click.BadParameter(f"{text!r} is less than {_LEAST_RATE} bytes a second: a move would hardly end")
    return rate


def _volume(text: str) -> tuple[str, str]:
    try:
        name, policy = volume.read(text)
    except ValueError as e:
        raise click.BadParameter(str(e)) from e
    return name, str(policy)


def remote_option(f: F) -> F:
    """Add how Ferry is called on other hosts."""
    return click.option(
        "--remote-command",
        default=lambda: os.environ.get("FERRY_REMOTE_COMMAND", "migrate"),
        help="How `migrate` is called on the other host (default: migrate, from the PATH that sshd gives).",
    )(f)


def json_option(f: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(f)


def doing_options(f: F) -> F:
    """Add what `move` and `pull` have in common, and `check` has not."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Print what would be done; touch nothing."),
        click.option("--keep-source", is_flag=True, help="Keep the container's files on the host that it leaves."),
        click.option(
            "--progress",
            "shown",
            type=click.Choice(KINDS),
            default="auto",
            help="On stderr: a live view (at a terminal), a line for each phase, a JSON object a line, or none (with --json).",
        ),
    ):
        f = option(f)
    return f


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
            default="auto",
            help="Send the memory while the container runs: when there is much of it (the default), always, or never.",
        ),
        click.option(
            "--max-downtime",
            "max_downtime_ms",
            metavar="TIME",
            default="300ms",
            callback=lambda c, p, v: milliseconds(v),
            help="Send memory until this can be kept (e.g. 300ms, 1.5s), or until it does not get better.",
        ),
        click.option(
            "--on-diverge",
            type=click.Choice(["switch", "throttle", "lazy", "abort"]),
            default="switch",
            help="When it does not get better: move all the same, slow it down step by step, send the rest later, leave it here.",
        ),
        click.option(
            "--bandwidth-limit",
            metavar="RATE",
            default="0",
            callback=lambda c, p, v: bandwidth(v),
            help="Send no more than this (e.g. 50M bytes, 400Mbit a second) while the container runs.",
        ),
        click.option(
            "--compress",
            type=click.Choice(["auto", "zstd", "none"]),
            default="auto",
            help="Compress what is sent: where it is seen to be faster, always, or never.",
        ),
        click.option(
            "--parallel",
            type=click.IntRange(1, 8),
            default=1,
            metavar="N",
            help="Send over so many SSH connections at once (default: 1): where one cannot fill the link.",
        ),
        click.option(
            "--volume",
            "volumes",
            metavar="NAME=POLICY",
            multiple=True,
            callback=lambda c, p, v: tuple(_volume(text) for text in v),
            help="What to do with a bind mount: copy it along, see that it is shared, or refuse. NAME is its path, or * for all.",
        ),
        click.option(
            "--ignore", metavar="CODE", multiple=True, help="Go on in spite of this finding of the preflight. May be repeated."
        ),
    ):
        f = option(f)
    return json_option(remote_option(f))
