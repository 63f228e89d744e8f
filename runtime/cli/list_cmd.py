"""`runtime list`"""

from __future__ import annotations

import contextlib
import json

import click

from runtime.cli.main import Globals
from runtime.container.container import Container
from runtime.errors import NotFound


@click.command(help="List the containers of this state root.")
@click.option("-f", "--format", "fmt", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="Print ids only.")
@click.pass_obj
def command(g: Globals, fmt: str, quiet: bool) -> None:
    found = []
    for container_id in g.store.ids():
        with contextlib.suppress(NotFound):  # deleted meanwhile
            found.append(Container(g.store, container_id).document())
    if quiet:
        for document in found:
            click.echo(document["id"])
    elif fmt == "json":
        click.echo(json.dumps(found or None))
    else:
        rows: list[tuple[str, ...]] = [("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")]
        rows += [tuple(str(d[k]) for k in ("id", "pid", "status", "bundle", "created", "owner")) for d in found]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
