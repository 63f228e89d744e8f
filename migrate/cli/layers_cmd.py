"""`migrate layers`"""

from __future__ import annotations

import json

import click

from migrate.cli.options import from_option, json_option, remote_option
from migrate.report import human_bytes
from migrate.session import Place


@click.command(help="List the layers of overlays that are kept on this host for containers that come to it.")
@click.option("--prune", is_flag=True, help="Remove those that no container here has.")
@json_option
@remote_option
@from_option
def command(prune: bool, source: str, as_json: bool, remote_command: str) -> int:
    session = Place.named(source).open(remote_command)
    try:
        rows = session.call("layers", prune=prune)["layers"]
    finally:
        session.close()
    if as_json:
        click.echo(json.dumps({"layers": rows}))
        return 0
    click.echo(f"{'LAYER':41} {'SIZE':>10} USED")
    for row in rows:
        used = "yes" if row["used"] else "removed" if prune else "no"
        click.echo(f"{row['digest']:41} {human_bytes(row['size_bytes']):>10} {used}")
    return 0
