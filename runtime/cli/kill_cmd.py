"""`runtime kill`"""

from __future__ import annotations

import click

from runtime.cli.main import Globals
from runtime.cli.options import signal_number
from runtime.container.container import Container


@click.command(help="Send a signal (default: TERM) to a container's first process.")
@click.option("-a", "--all", "everything", is_flag=True, help="Send it to all processes of the container.")
@click.argument("container_id")
@click.argument("signal", default="TERM")
@click.pass_obj
def command(g: Globals, everything: bool, container_id: str, signal: str) -> None:
    Container(g.store, container_id).kill(signal_number(signal), everything)
