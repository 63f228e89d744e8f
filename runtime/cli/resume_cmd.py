"""`runtime resume`"""

from __future__ import annotations

import click

from runtime.cli.main import Globals
from runtime.container.container import Container


@click.command(help="Let the processes of a paused container run.")
@click.argument("container_id")
@click.pass_obj
def command(g: Globals, container_id: str) -> None:
    Container(g.store, container_id).resume()
