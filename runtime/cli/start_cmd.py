"""`runtime start`"""

from __future__ import annotations

import click

from runtime.cli.main import Globals
from runtime.container.container import Container


@click.command(help="Run the program of a created container.")
@click.argument("container_id")
@click.pass_obj
def command(g: Globals, container_id: str) -> None:
    Container(g.store, container_id).start()
