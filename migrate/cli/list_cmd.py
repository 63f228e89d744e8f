"""`migrate list`"""

from __future__ import annotations

import json

import click

from migrate import host as hosts
from migrate.cli.options import remote_option
from migrate.errors import MigrateError
from migrate.session import open_local, open_remote


@click.command(help="List the containers of hosts; without a host, of this one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@remote_option
@click.argument("host", nargs=-1)
def command(host: tuple[str, ...], as_json: bool, remote_command: str) -> int:
    rows, failures = [], {}
    for name in host or ("-",):
        try:
            session = open_local() if name == "-" else open_remote(hosts.resolve(name), remote_command)
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
