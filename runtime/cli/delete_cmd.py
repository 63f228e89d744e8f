"""`runtime delete`"""

from __future__ import annotations

import contextlib

import click

from runtime.cli.main import Globals
from runtime.container.container import Container
from runtime.errors import NotFound


@click.command(help="Remove what is left of a stopped container.")
@click.option("-f", "--force", is_flag=True, help="Kill it first if it runs; one that does not exist is no error.")
@click.argument("container_id")
@click.pass_obj
def command(g: Globals, force: bool, container_id: str) -> None:
    with contextlib.suppress(*((NotFound,) if force else ())):
        Container(g.store, container_id).delete(force)
