"""`migrate pull`"""

from __future__ import annotations

from typing import Any

import click

from migrate.cli.move_cmd import run
from migrate.cli.options import move_options
from migrate.plan import Request


@click.command(help="Move a running container of another host to this one.")
@move_options
@click.option("--dry-run", is_flag=True, help="Print what would be done; touch nothing.")
@click.option("--keep-source", is_flag=True, help="Keep the container's files on the host that it leaves.")
@click.argument("container")
@click.argument("host")
def command(container: str, host: str, dry_run: bool, as_json: bool, **options: Any) -> int:
    return run(Request(container, host, "-", **options), dry_run, as_json)
