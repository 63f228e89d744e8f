"""`migrate history`"""

from __future__ import annotations

import json

import click

from migrate.cli.options import from_option, json_option, remote_option
from migrate.errors import MigrateError
from migrate.session import Place


@click.command(help="List the moves that this host took part in; with an id, show the report of one.")
@json_option
@remote_option
@from_option
@click.argument("migration_id", metavar="[ID]", required=False)
def command(migration_id: str | None, source: str, as_json: bool, remote_command: str) -> int:
    session = Place.named(source).open(remote_command)
    try:
        if migration_id is not None:
            report = session.call("report", migration_id=migration_id)["report"]
            if report is None:
                raise MigrateError(f"{migration_id} has no report on this host", hint="its source has it, when it is over")
            click.echo(json.dumps(report, indent=None if as_json else 2))
            return 0
        rows = session.call("records")["records"]
    finally:
        session.close()
    if as_json:
        click.echo(json.dumps({"moves": rows}))
        return 0
    click.echo(f"{'MOVE':24} {'CONTAINER':20} {'FROM':12} {'TO':12} {'HERE':7} OUTCOME")
    for row in rows:
        outcome = row["outcome"] or ("under way" if row["under_way"] else "not over")
        click.echo(
            f"{row['migration_id']:24} {row['container']:20} {row['source']:12} {row['target']:12} {row['role']:7} {outcome}"
        )
    return 0
