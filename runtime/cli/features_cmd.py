"""`runtime features`"""

from __future__ import annotations

import json

import click

from runtime.criu import features as criu_features
from runtime.memory import tracker
from runtime.spec import features


@click.command(help="Print what this runtime can do, as JSON.")
def command() -> None:
    document = features.document()
    document["annotations"].update(criu_features.examine())
    document["annotations"]["ferry.follows-memory"] = "true" if tracker.supported() else "false"
    click.echo(json.dumps(document, indent=2))
