"""`migrate check`"""

from __future__ import annotations

import json
from typing import Any

import click

from migrate.cli.options import from_option, move_options
from migrate.coordinator import Survey
from migrate.errors import EXIT_CODES, Outcome
from migrate.plan import Request
from migrate.preflight import refusals


@click.command(help="Say whether a container can be moved to a host; touch nothing.")
@move_options
@from_option
@click.argument("container")
@click.argument("host")
def command(container: str, host: str, source: str, as_json: bool, **options: Any) -> int:
    survey = Survey(Request(container, source, host, **options))
    survey.close()
    if as_json:
        click.echo(json.dumps({"findings": [f.as_dict() for f in survey.findings]}))
    else:
        for finding in survey.findings:
            remedy = f" ({finding.remedy})" if finding.remedy else ""
            click.echo(f"{finding.severity:4} {finding.code:24} {finding.words}{remedy}")
    return EXIT_CODES[Outcome.REFUSED] if refusals(survey.findings) else 0
