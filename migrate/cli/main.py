"""The table of verbs, and the one place where an error becomes an exit status."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import click

from migrate import __version__
from migrate.errors import MigrateError

VERBS = ("abort", "check", "history", "layers", "list", "move", "pull", "recover", "report", "status")
# Those that are about unfinished moves, and need not be told of them.
_TELL_NOT = {"abort", "history", "recover", "report", "status"}


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
    if argv and argv[0] in VERBS and argv[0] not in _TELL_NOT and "--json" not in argv:
        _tell_unfinished()
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


def _tell_unfinished() -> None:
    """Say which moves were left behind on this host: nobody else will."""
    from migrate import locks, records

    for r in records.unfinished():
        released = r.role == "target" and records.was_released(r.migration_id)
        if not released and (not r.container or locks.holder(r.container) is None):
            print(
                f"migrate: the move {r.migration_id} of {r.container or 'a container'} from {r.source} to {r.target} is not over"
                f" (migrate recover {r.migration_id})",
                file=sys.stderr,
            )
