"""`runtime state`"""

from __future__ import annotations

import json

import click

from runtime.cli.main import Globals
from runtime.container.container import Container


@click.command(help="Print the state of a container as JSON.")
@click.argument("container_id")
@click.pass_obj
def command(g: Globals, container_id: str) -> None:
    click.echo(json.dumps(Container(g.store, container_id).document(), indent=2))
