"""`migrate abort`"""

from __future__ import annotations

import json
import time

import click

from migrate.cli.options import from_option, json_option, remote_option
from migrate.errors import MigrateError
from migrate.recovery import resolve
from migrate.session import Place

_WAIT_S, _LOOK_S = 120.0, 0.2


@click.command(help="End a move before its decision: the container runs on where it is. After it, the move goes forward.")
@json_option
@remote_option
@from_option
@click.argument("migration_id", metavar="ID")
def command(migration_id: str, source: str, as_json: bool, remote_command: str) -> int:
    place = Place.named(source)
    session = place.open(remote_command)
    try:
        role = session.call("plan", migration_id=migration_id)["role"]
        under_way = role == "source" and bool(session.call("stop", migration_id=migration_id)["under_way"])
        deadline = time.monotonic() + _WAIT_S
        while under_way:
            row = next(r for r in session.call("records")["records"] if r["migration_id"] == migration_id)
            if not row["open"]:
                _say(as_json, migration_id, row["outcome"], "")
                return 0
            under_way = row["under_way"]
            if time.monotonic() > deadline:
                raise MigrateError(f"{migration_id} does not end", hint="migrate status")
            time.sleep(_LOOK_S)
    finally:
        session.close()
    found = resolve(place, migration_id, remote_command, lambda line: click.echo(line, err=True), run_on="nowhere")
    _say(as_json, migration_id, str(found.outcome), found.words)
    return 0 if found.settled else 5


def _say(as_json: bool, migration_id: str, outcome: str, words: str) -> None:
    if as_json:
        click.echo(json.dumps({"migration_id": migration_id, "outcome": outcome, "words": words}))
    else:
        click.echo(f"{migration_id}: {outcome}{': ' + words if words else ''}")
