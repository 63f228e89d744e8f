"""`migrate status`"""

from __future__ import annotations

import json

import click

from migrate.cli.options import from_option, json_option, remote_option
from migrate.recovery import unfinished
from migrate.session import Place


@click.command(help="List the moves of this host that are under way, or were left behind.")
@json_option
@remote_option
@from_option
def command(source: str, as_json: bool, remote_command: str) -> int:
    session = Place.named(source).open(remote_command)
    try:
        rows = unfinished(session)
    finally:
        session.close()
    for row in rows:
        row["state"] = _state(row)
    if as_json:
        click.echo(json.dumps({"moves": rows}))
        return 0
    click.echo(f"{'MOVE':24} {'CONTAINER':20} {'FROM':12} {'TO':12} STATE")
    for row in rows:
        click.echo(f"{row['migration_id']:24} {row['container']:20} {row['source']:12} {row['target']:12} {row['state']}")
    return 0


def _state(row: dict[str, object]) -> str:
    if row["waits"]:
        return f"prepared here; waits for what {row['source']} decided: migrate recover {row['migration_id']}"
    if row["under_way"]:
        return "under way"
    if row["released"]:
        return f"runs here; {row['source']} has not confirmed it yet"
    return f"left behind: migrate recover {row['migration_id']}"
