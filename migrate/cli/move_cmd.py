"""`migrate move`"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from migrate.cli import progress
from migrate.cli.options import doing_options, from_option, move_options
from migrate.coordinator import Survey, move
from migrate.errors import EXIT_CODES, Outcome, from_dict
from migrate.plan import Plan, Request
from migrate.report import human_bytes, sentence


@click.command(help="Move a running container to another host; with --from, from another host, too.")
@move_options
@from_option
@doing_options
@click.argument("container")
@click.argument("host")
def command(container: str, host: str, source: str, dry_run: bool, as_json: bool, shown: str, **options: Any) -> int:
    return run(Request(container, source, host, **options), dry_run, as_json, shown)


def run(request: Request, dry_run: bool, as_json: bool, shown: str) -> int:
    """Move, or say what would be done; return the exit status. `shown` is how it is shown meanwhile."""
    if dry_run:
        survey = Survey(request)
        try:
            plan = survey.plan()
        finally:
            survey.close()
        click.echo(json.dumps(plan.as_dict(), indent=2) if as_json else _words(plan))
        return 0
    watching = progress.make(shown, sys.stderr, as_json)
    try:
        report = move(request, watching)
    finally:
        watching.close()
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    else:
        if report.error is not None:
            click.echo(f"migrate: {from_dict(report.error)}", err=True)
        for error in report.undo_errors:
            click.echo(f"migrate: left to do: {error}", err=True)
        click.echo(sentence(report), err=report.outcome != Outcome.COMPLETED)
    # A move can be over, and the container lost after it.
    return EXIT_CODES[report.outcome] or (1 if report.error is not None else 0)


def _words(plan: Plan) -> str:
    lines = [
        f"move {plan.container} from {plan.source} to {plan.target}",
        f"  bundle {plan.bundle}, {human_bytes(plan.files_bytes)} of files, {human_bytes(plan.memory_bytes)} of memory",
    ]
    for phase in plan.as_dict()["phases"]:
        lines.append(f"  {phase['phase']:10} {phase['what']}{'  [downtime]' if phase['downtime'] else ''}")
    return "\n".join(lines)
