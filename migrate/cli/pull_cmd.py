"""`migrate pull`"""

from __future__ import annotations

from typing import Any

import click

from migrate.cli.move_cmd import run
from migrate.cli.options import doing_options, move_options
from migrate.plan import Request


@click.command(help="Move a running container of another host to this one.")
@move_options
@doing_options
@click.argument("container")
@click.argument("host")
def command(container: str, host: str, dry_run: bool, as_json: bool, shown: str, **options: Any) -> int:
    return run(Request(container, host, "-", **options), dry_run, as_json, shown)
