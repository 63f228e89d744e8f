"""`runtime ps`"""

from __future__ import annotations

import json
import subprocess

import click

from runtime.cli.main import Globals
from runtime.container.container import Container
from runtime.errors import ContainerError


@click.command(
    help="List the processes of a container, by ps with its options.", context_settings={"ignore_unknown_options": True}
)
@click.option("-f", "--format", "fmt", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.argument("container_id")
@click.argument("ps_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def command(g: Globals, fmt: str, container_id: str, ps_options: tuple[str, ...]) -> None:
    pids = Container(g.store, container_id).pids()
    if fmt == "json":
        click.echo(json.dumps(pids))
        return
    try:
        lines = subprocess.run(
            ["ps", *(ps_options or ("-ef",))], stdout=subprocess.PIPE, check=True, text=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as e:
        raise ContainerError(f"cannot list processes with ps: {e}") from e
    columns = lines[0].split()
    if "PID" not in columns:
        raise ContainerError("ps prints no PID column with these options")
    click.echo(lines[0])
    for line in lines[1:]:
        fields = line.split()
        if len(fields) > columns.index("PID") and fields[columns.index("PID")] in map(str, pids):
            click.echo(line)
