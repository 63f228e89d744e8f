"""The table of verbs, and the one place where an error becomes an exit status."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import click

from migrate import __version__
from migrate.errors import MigrateError

VERBS = ("check", "list", "move")


class LazyGroup(click.Group):
    """Knows its verbs by name and imports a verb's file when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = import_module(f"migrate.cli.{name}_cmd").command
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-v", "--version", prog_name="migrate")
def cli() -> None:
    """Move running containers to another host, over SSH.

    Hosts are named as for ssh: ~/.ssh/config, known_hosts and the agent count.
    """


def run(argv: list[str]) -> int:
    """Run one verb; return the exit status."""
    try:
        result: Any = cli.main(argv, prog_name="migrate", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        e.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except MigrateError as e:
        if "--json" in argv:
            print(json.dumps({"error": e.as_dict()}))
        print(f"migrate: {e}", file=sys.stderr)
        return e.exit_code
