"""`runtime features`"""

from __future__ import annotations

import json

import click

from runtime.spec import features


@click.command(help="Print what this runtime can do, as JSON.")
def command() -> None:
    click.echo(json.dumps(features.document(), indent=2))
