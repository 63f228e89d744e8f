"""`migrate recover`"""

from __future__ import annotations

import json
from typing import Any

import click

from migrate.cli.options import from_option, json_option, remote_option
from migrate.errors import MigrateError
from migrate.recovery import exit_code, left_behind, resolve, unfinished
from migrate.resolve import Resolution
from migrate.session import Place


@click.command(help="Bring moves that were left behind to their end; without an id, all that this host knows of.")
@json_option
@remote_option
@from_option
@click.option("--other", metavar="HOST", default="", help="The other host of the move (default: as the record tells).")
@click.option(
    "--run-on",
    type=click.Choice(["source", "target"]),
    help="Where it is to run, when that cannot be told from here. You answer for it that it does not run on the other host.",
)
@click.argument("migration_id", metavar="[ID]", required=False)
def command(migration_id: str | None, source: str, as_json: bool, remote_command: str, other: str, run_on: str | None) -> int:
    if run_on and migration_id is None:
        raise click.UsageError("--run-on needs the id of one move")
    place = Place.named(source)
    ids = [migration_id] if migration_id is not None else _ids(place, remote_command)
    resolutions: list[Resolution] = []
    rows: list[dict[str, Any]] = []
    failures = 0

    def say(line: str) -> None:
        if not as_json:
            click.echo(line, err=True)

    for name in ids:
        try:
            found = resolve(place, name, remote_command, say, other=other, run_on=run_on or "")
        except MigrateError as e:
            failures += 1
            rows.append({"migration_id": name, "error": e.as_dict()})
            click.echo(f"migrate: {name}: {e}", err=True)
            continue
        resolutions.append(found)
        rows.append({"migration_id": name, **_row(found)})
        if not as_json:
            click.echo(f"{name}: {found.outcome}: {found.words}")
            for error in found.errors:
                click.echo(f"migrate: left to do: {error}", err=True)
    if as_json:
        click.echo(json.dumps({"recovered": rows}))
    elif not ids:
        click.echo("nothing is left to recover")
    return exit_code(resolutions, failures)


def _ids(place: Place, remote_command: str) -> list[str]:
    session = place.open(remote_command)
    try:
        # A target that has released has nothing to do: its source has.
        return [str(r["migration_id"]) for r in unfinished(session) if left_behind(r) and not r["released"]]
    finally:
        session.close()


def _row(found: Resolution) -> dict[str, Any]:
    return {
        "outcome": str(found.outcome),
        "settled": found.settled,
        "action": str(found.action),
        "source": str(found.source),
        "target": str(found.target),
        "words": found.words,
        "errors": found.errors,
    }
