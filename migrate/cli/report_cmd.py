"""`migrate report`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from migrate.cli.options import from_option, json_option, remote_option
from migrate.errors import MigrateError
from migrate.page import page
from migrate.session import Place
from migrate.story import lines, tell


@click.command(help="Show a move again: its phases, the passes over its memory, and where its downtime went.")
@json_option
@remote_option
@from_option
@click.option("--html", "html", metavar="FILE", type=click.Path(path_type=Path), help="Write it as one page with its pictures.")
@click.argument("migration_id", metavar="ID")
def command(migration_id: str, html: Path | None, source: str, as_json: bool, remote_command: str) -> int:
    session = Place.named(source).open(remote_command)
    try:
        report = session.call("report", migration_id=migration_id)["report"]
    finally:
        session.close()
    if not isinstance(report, dict):
        raise MigrateError(f"{migration_id} has no report on this host", hint="its source has it, when it is over")
    if html is not None:
        try:
            html.write_text(page(tell(report)), encoding="utf-8")
        except OSError as e:
            raise MigrateError(f"cannot write {html}: {e.strerror}") from e
    elif not as_json:
        click.echo("\n".join(lines(tell(report))))
    if as_json:
        click.echo(json.dumps(report))
    return 0
