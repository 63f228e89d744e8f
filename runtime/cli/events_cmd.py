"""`runtime events`"""

from __future__ import annotations

import json
import select
import time
from typing import Any

import click

from runtime.cli.main import Globals
from runtime.container.container import Container
from runtime.container.lifecycle import Status
from runtime.errors import ContainerError, UsageError, WrongStatus
from runtime.linux.process import pidfd_open

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@click.command(help="Print what a container uses, and when the kernel kills for want of memory, until it ends.")
@click.option("--interval", default="5s", show_default=True, metavar="DURATION", help="Time between two statistics.")
@click.option("--stats", is_flag=True, help="Print the statistics once.")
@click.argument("container_id")
@click.pass_obj
def command(g: Globals, interval: str, stats: bool, container_id: str) -> None:
    interval_s = seconds(interval)
    container = Container(g.store, container_id)
    if container.status() == Status.STOPPED:
        raise WrongStatus(f"container not running: {container_id}")
    manager = container.manager()

    def tell(kind: str, data: Any) -> None:
        click.echo(json.dumps({"type": kind, "id": container_id, **({"data": data} if data is not None else {})}))

    if stats:
        tell("stats", manager.stats())
        return
    try:
        pidfd = pidfd_open(container.state.pid)
    except ProcessLookupError:
        raise WrongStatus(f"container not running: {container_id}") from None
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    kills, due = manager.oom_kills(), time.monotonic()
    while True:
        now = time.monotonic()
        if now >= due:
            tell("stats", manager.stats())
            due = now + interval_s
        # Kills are looked for more often than statistics are due: they are to be told when they happen.
        ended = poll.poll(1000 * min(0.5, max(0.0, due - time.monotonic())))
        found = manager.oom_kills()
        for _ in range(found - kills):
            tell("oom", None)
        kills = max(kills, found)
        if ended:
            return


def seconds(text: str) -> float:
    """Read a duration such as `500ms`, `5s`, `1m`. Raises: ContainerError."""
    number = text.rstrip("mshMSH")
    unit = text[len(number) :].lower() or "s"
    try:
        value = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ContainerError(f"--interval: {text!r} is no duration", hint="write 500ms, 5s or 1m") from None
    if value <= 0:
        raise UsageError("--interval: must be above 0")
    return value
