"""`migrate list`"""

from __future__ import annotations

import json

import click

from migrate.cli.options import json_option, remote_option
from migrate.errors import MigrateError
from migrate.session import Place


@click.command(help="List the containers of hosts; without a host, of this one.")
@json_option
@remote_option
@click.argument("host", nargs=-1)
def command(host: tuple[str, ...], as_json: bool, remote_command: str) -> int:
    rows, failures = [], {}
    for name in host or ("-",):
        try:
            session = Place.named(name).open(remote_command)
            try:
                containers = session.call("list")["containers"]
            finally:
                session.close()
        except MigrateError as e:
            failures[name] = e
            continue
        rows += [{"host": "this host" if name == "-" else name, **c} for c in containers]
    if as_json:
        click.echo(json.dumps({"containers": rows, "errors": {n: e.as_dict() for n, e in failures.items()}}))
    else:
        click.echo(f"{'HOST':15} {'CONTAINER':20} {'STATUS':10} {'PID':>7}  BUNDLE")
        for row in rows:
            click.echo(f"{row['host']:15} {row['id']:20} {row['status']:10} {row['pid']:>7}  {row['bundle']}")
    for error in failures.values():
        click.echo(f"migrate: {error}", err=True)
    return 1 if failures else 0
